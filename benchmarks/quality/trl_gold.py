"""TRL's own GOLD trainer as an arm, run as its users run it: its defaults, except for what all arms share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arms import Arm
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRL_GOLD = "trl-gold"


def gold_trainer(
    arm: Arm,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    common: dict[str, Any],
    data: Dataset,
    folder: Path,
) -> Any:
    """The trainer, with the arm's options of `GOLDConfig` behind `trl-gold:`.

    Its loss across tokenizers is turned on. Sampling temperature, nucleus and the share of on-policy steps are TRL's
    own defaults; numbers stay in float32 and nothing is computed twice, as for the other arms. The teacher's tokenizer
    is read from a folder: TRL takes no object.

    Raises:
        ImportError: TRL is not installed.
    """
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    place = folder / "teacher-tokenizer"
    tokenizers[1].save_pretrained(place)
    (options,) = arm.options["objective"]
    own = {} if isinstance(options, str) else {key: value for key, value in options.items() if key != "name"}
    of_trainer = {key: value for key, value in arm.options.items() if key != "objective"}
    config = dict(
        use_uld_loss=True,
        teacher_tokenizer_name_or_path=str(place),
        bf16=False,
        gradient_checkpointing=False,
    )
    args = GOLDConfig(**{**config, **common, **own, **of_trainer})
    return GOLDTrainer(student, teacher, args, train_dataset=data, processing_class=tokenizers[0])
