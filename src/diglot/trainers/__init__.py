"""GKD and MiniLLM: sample, ask, align, compare, step."""

from diglot.options import DistillationConfig, GKDConfig, MiniLLMConfig
from diglot.trainers.gkd import GKDTrainer
from diglot.trainers.minillm import MiniLLMTrainer

__all__ = ["DistillationConfig", "GKDConfig", "GKDTrainer", "MiniLLMConfig", "MiniLLMTrainer"]
