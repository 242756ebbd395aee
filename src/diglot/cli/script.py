"""Options of `diglot train` that are not a trainer's: which models, which data, which adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diglot.options.config import option
from diglot.ranges import check_ranges


@dataclass
class TrainArguments:
    """What the command line needs besides `GKDConfig` or `MiniLLMConfig`."""

    trainer: str = option("gkd", "Which method trains.", "Objective", choices=["gkd", "minillm"])

    model_name_or_path: str | None = option(None, "The student: a model id or a folder.", "Student")
    model_revision: str | None = option(None, "Revision of the student's model and tokenizer.", "Student")
    tokenizer_name_or_path: str | None = option(None, "The student's tokenizer, if not beside its weights.", "Student")
    dtype: str | None = option(
        None,
        "Number type in which the student's weights are loaded; by default float32, under an adapter the file's own.",
        "Student",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
    attn_implementation: str | None = option(None, "Attention of the student, for instance sdpa.", "Student")
    trust_remote_code: bool = option(False, "Run code that comes with the student's repository.", "Student")
    use_peft: bool = option(False, "Train a LoRA adapter instead of all weights.", "Student")
    lora_r: int = option(16, "Rank of the adapter.", "Student")
    lora_alpha: int = option(32, "Scale of the adapter.", "Student")
    lora_dropout: float = option(0.0, "Dropout of the adapter.", "Student")
    lora_target_modules: str | list[str] | None = option(None, "Modules that get an adapter.", "Student")

    dataset_name: str | list[Any] | None = option(
        None,
        "A hub id, a JSONL, Parquet, CSV or text file, or a folder. Or a list of names or of {name, weight, config, "
        "split, format, columns}: several datasets.",
        "Data",
    )
    dataset_format: str | None = option(
        None,
        "How other programs write such rows: ShareGPT's turns, Alpaca's instructions, preferences (the chosen answer), "
        "or messages as JSON text.",
        "Data",
        choices=["sharegpt", "alpaca", "preference", "json_text"],
    )
    dataset_columns: str | dict[str, Any] | None = option(
        None,
        "Which columns are read, as NAME=COLUMN with commas between or a mapping. Names: prompt, completion, messages, "
        "text, tools, teacher_prompt, teacher; for a conversation user, assistant, system, history.",
        "Data",
    )
    dataset_config: str | None = option(None, "Configuration of a hub dataset.", "Data")
    dataset_train_split: str = option("train", "Split to train on.", "Data")
    eval_dataset_name: str | list[Any] | None = option(
        None, "What to evaluate on, where it is not a split of dataset_name.", "Data"
    )
    dataset_test_size: float | None = option(
        None, "Rows of the training data held out to evaluate on: a share below 1, or a number.", "Data"
    )
    dataset_test_split: str = option("test", "Split to evaluate on, read if eval_strategy asks for it.", "Data")
    dataset_streaming: bool = option(False, "Read rows when they are needed.", "Data")
    lm_dataset_name: str | None = option(None, "MiniLLM: texts for the language-modelling loss.", "Data")

    dry_run: bool = option(False, "Print the resolved options and stop.", "Training")

    def __post_init__(self) -> None:
        check_ranges(vars(self))
