"""What does the student write? Token ids as sampled, from prompts of token ids."""

from diglot.rollouts.engine import Completion, RolloutEngine
from diglot.rollouts.mixture import TeacherMixture
from diglot.rollouts.prefix import continue_prefixes, mixture_weight, write_prefixes
from diglot.rollouts.sampler import TransformersSampler

__all__ = [
    "Completion",
    "RolloutEngine",
    "TeacherMixture",
    "TransformersSampler",
    "continue_prefixes",
    "mixture_weight",
    "write_prefixes",
]
