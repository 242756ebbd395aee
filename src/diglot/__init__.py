"""On-policy distillation of language models whose tokenizers differ.

Names are imported on first use, so that `import diglot` and `diglot --help` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diglot.engines import project_teacher_scores
    from diglot.errors import DiglotError
    from diglot.objectives import OBJECTIVES, make_objective
    from diglot.teachers import build_teacher_inputs_from_texts
    from diglot.trainers import GKDConfig, GKDTrainer, MiniLLMConfig, MiniLLMTrainer
    from diglot.vocabulary import Vocabulary

__version__ = "0.1.0"

__all__ = [
    "OBJECTIVES",
    "DiglotError",
    "GKDConfig",
    "GKDTrainer",
    "MiniLLMConfig",
    "MiniLLMTrainer",
    "Vocabulary",
    "build_teacher_inputs_from_texts",
    "make_objective",
    "project_teacher_scores",
]

_HOMES = {
    "DiglotError": "diglot.errors",
    "OBJECTIVES": "diglot.objectives",
    "make_objective": "diglot.objectives",
    "project_teacher_scores": "diglot.engines",
    "Vocabulary": "diglot.vocabulary",
    "build_teacher_inputs_from_texts": "diglot.teachers",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'diglot' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "diglot.trainers")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
