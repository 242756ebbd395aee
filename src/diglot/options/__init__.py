"""What a run is asked to do: options with their texts, ranges and secrets. Nothing here is written to later."""

from diglot.options.config import DistillationConfig, GKDConfig, MiniLLMConfig
from diglot.options.teacher import TeacherOptions

__all__ = ["DistillationConfig", "GKDConfig", "MiniLLMConfig", "TeacherOptions"]
