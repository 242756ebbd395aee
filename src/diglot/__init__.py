"""On-policy distillation of language models whose tokenizers differ.

Names are imported on first use, so that `import diglot` and `diglot --help` do not wait for torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diglot.engines import project_teacher_scores
    from diglot.errors import DiglotError
    from diglot.inspection import inspect_pair
    from diglot.objectives import OBJECTIVES, Level, Objective, make_objective
    from diglot.options import GKDConfig, MiniLLMConfig
    from diglot.teachers import build_teacher_inputs_from_texts
    from diglot.trainers import GKDTrainer, MiniLLMTrainer
    from diglot.vocabulary import Vocabulary

__version__ = "0.1.0"

__all__ = [
    "OBJECTIVES",
    "DiglotError",
    "GKDConfig",
    "GKDTrainer",
    "Level",
    "MiniLLMConfig",
    "MiniLLMTrainer",
    "Objective",
    "Vocabulary",
    "build_teacher_inputs_from_texts",
    "inspect_pair",
    "make_objective",
    "project_teacher_scores",
]

_HOMES = {
    "DiglotError": "diglot.errors",
    "GKDConfig": "diglot.options",
    "Level": "diglot.objectives",
    "MiniLLMConfig": "diglot.options",
    "OBJECTIVES": "diglot.objectives",
    "Objective": "diglot.objectives",
    "project_teacher_scores": "diglot.engines",
    "Vocabulary": "diglot.vocabulary",
    "build_teacher_inputs_from_texts": "diglot.teachers",
    "inspect_pair": "diglot.inspection",
    "make_objective": "diglot.objectives",
}

# bitsandbytes, which transformers imports, warns at its import of a kernel that it can do without.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'diglot' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "diglot.trainers")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
