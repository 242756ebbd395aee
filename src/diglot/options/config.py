"""Options of both trainers: one flat dataclass each, on top of `transformers.TrainingArguments`.

The names are TRL's where TRL has one. `metadata["help"]` is the one text that `--help`, the option schema and the
documentation show; `metadata["group"]` says under which heading.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from diglot.errors import ConfigError
from diglot.http.address import checked_address, is_address
from diglot.options.secrets import is_secret, without_secrets
from diglot.ranges import as_mapping, check_ranges, check_texts, one_of
from diglot.values import check_kind


def option(default: Any, text: str, group: str, **metadata: Any) -> Any:
    """A dataclass field with its help text and the heading under which `--help` lists it."""
    return field(default=default, metadata={"help": text, "group": group, **metadata})


def _require(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={value!r} is not allowed: it must be {rule}.")


_MAPPINGS = (
    "model_init_kwargs", "chat_template_kwargs", "teacher_model_init_kwargs", "teacher_chat_template_kwargs",
    "tokenizer_kwargs", "teacher_tokenizer_kwargs",
    "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs",
)  # fmt: skip


@dataclass
class DistillationConfig(TrainingArguments):
    """What GKD and MiniLLM have in common. Lengths are in tokens of the side they belong to."""

    # Settings of the parent whose defaults would hide something or fit fine-tuning only.
    output_dir: str | None = option(None, "Where the student, its checkpoints and the logs go.", "Training")
    max_steps: int = option(-1, "Optimizer steps; -1: as many as `num_train_epochs` makes.", "Training")
    learning_rate: float = option(1e-5, "Peak learning rate.", "Training")
    logging_steps: float = option(10, "Log every so many optimizer steps.", "Logging")
    logging_nan_inf_filter: bool = option(False, "Hide non-finite losses in the log (never on by default).", "Logging")
    remove_unused_columns: bool = option(False, "Kept off: conversations are rendered from their own columns.", "Data")
    report_to: str | list[str] | None = option("none", "Trackers: tensorboard, wandb, trackio ...", "Logging")

    resume_from_checkpoint: str | None = option(
        None, "Continue a run: from its last complete checkpoint, or from the one in the folder given.", "Training"
    )

    # Student
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Arguments for `from_pretrained` of the student when it is given by name.", "Student"
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None, """Arguments for the student's chat template, for instance {"enable_thinking": false}.""", "Student"
    )
    tokenizer_kwargs: dict[str, Any] | str | None = option(
        None,
        'Arguments for `from_pretrained` of the student\'s tokenizer; {"tokenizer_class": "TokenizersBackend"} reads '
        'its tokenizer.json as it is, {"chat_template": "FILE.jinja"} gives it the chat template in a file.',
        "Student",
    )
    disable_dropout: bool = option(True, "Turn the student's dropout off, and the jitter of its routers.", "Student")

    # Teacher
    teacher_model_name_or_path: str | list[Any] | None = option(
        None,
        "The teacher: a model id, a folder, a .gguf file, a folder of `diglot score`, the address of a server "
        "(http://HOST:PORT), or `self`, the student with its adapter off. Or a list of names or of {name, weight, "
        "label, tokenizer, ...}: several teachers.",
        "Teacher",
    )
    teacher_model_server_url: str | None = option(
        None,
        "Address of the teacher's server; `teacher_model_name_or_path` is then the model's name there. A key comes "
        "from the environment variable DIGLOT_TEACHER_API_KEY.",
        "Teacher",
    )
    teacher_server_concurrency: int = option(8, "Requests to the teacher's server at a time.", "Teacher")
    teacher_server_timeout: float = option(
        120.0, "Seconds that one request to the teacher's server may take.", "Teacher"
    )
    teacher_server_retry_seconds: float = option(
        600.0, "A request that keeps failing for so long stops the run, with a checkpoint.", "Teacher"
    )
    teacher_model_revision: str | None = option(None, "Revision of the teacher's model and tokenizer.", "Teacher")
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Arguments for `from_pretrained` of the teacher when it is given by name.", "Teacher"
    )
    teacher_tokenizer_name_or_path: str | None = option(
        None, "The teacher's tokenizer, when it is not the one beside the teacher's weights.", "Teacher"
    )
    teacher_tokenizer_kwargs: dict[str, Any] | str | None = option(
        None, "Arguments for `from_pretrained` of the teacher's tokenizer, as `tokenizer_kwargs`.", "Teacher"
    )
    teacher_trust_remote_code: bool = option(False, "Run code that comes with the teacher's repository.", "Teacher")
    teacher_chat_template_kwargs: dict[str, Any] | str | None = option(
        None, "Arguments for the teacher's chat template.", "Teacher"
    )
    teacher_system_prompt: str | None = option(
        None,
        "A text that only the teacher reads, before everything else. What it is to read for a single row, in place of "
        "the prompt, stands in the column `teacher_prompt`.",
        "Teacher",
    )
    teacher_max_length: int | None = option(
        None,
        "Longest text the teacher reads, in its tokens; default: the model's limit. The rest is not scored.",
        "Teacher",
    )

    reference_teacher_model_name_or_path: str | None = option(
        None, "A small model with the teacher's tokenizer, for objectives with `reference_alpha`.", "Teacher"
    )
    reference_model_name_or_path: str | None = option(
        None, "The student before training, for the same; by default where the student was loaded from.", "Teacher"
    )

    # Data
    max_length: int | None = option(
        1024,
        "Longest prompt + completion in student tokens. The end is cut, never the front; "
        "a sample whose prompt alone does not fit is dropped and counted.",
        "Data",
    )
    on_bad_row: str = option(
        "stop",
        "At a row that cannot be used, found by reading all rows once before training: `stop`, or `skip` and count it.",
        "Data",
        choices=["stop", "skip"],
    )
    markers: str = option(
        "read",
        "Names of control tokens in the text of messages, such as <|im_end|>: `read` as control tokens, as a served "
        "model reads them, as plain `text`, or `refuse` such a row.",
        "Data",
        choices=["read", "text", "refuse"],
    )
    fold_system: bool = option(
        False, "A system message that a chat template refuses or drops goes into the first user's message.", "Data"
    )
    score_turns: str = option(
        "last", "Which assistant turns of a conversation are trained on.", "Data", choices=["last", "all"]
    )
    score_reasoning: bool = option(True, "Compare what stands in think blocks.", "Data")
    score_tool_calls: bool = option(True, "Compare what stands in tool calls.", "Data")

    # Generation
    max_completion_length: int = option(128, "Longest completion the student writes.", "Generation")
    temperature: float = option(1.0, "Temperature of sampling (the divergence has `kd_temperature`).", "Generation")
    top_p: float = option(
        1.0, "Nucleus sampling; below 1 the samples are no longer the student's own distribution.", "Generation"
    )
    top_k: int = option(0, "Top-k sampling, 0: off.", "Generation")
    num_generations: int = option(1, "Completions per prompt.", "Generation")

    rollout_ahead: int = option(
        0,
        "1: the student writes the next completions with the weights of before the optimizer steps on these, so that "
        "a vLLM server writes while the student is trained (docs/rollouts.md). They are older by those steps: policy "
        "gradients are weighted for it, divergences are not.",
        "Generation",
    )

    # vLLM (names as TRL's)
    use_vllm: bool = option(False, "Let vLLM write the student's completions.", "Generation")
    vllm_mode: str = option(
        "server",
        "`server`: a running `vllm serve STUDENT`; `colocate`: vLLM in this process.",
        "Generation",
        choices=["server", "colocate"],
    )
    vllm_server_base_url: str | None = option(
        None, "Address of vLLM's server, instead of host and port. A key comes from DIGLOT_VLLM_API_KEY.", "Generation"
    )
    vllm_server_host: str = option("127.0.0.1", "Its host.", "Generation")
    vllm_server_port: int = option(8000, "Its port.", "Generation")
    vllm_server_timeout: float = option(
        240.0,
        "Seconds for one request to it, and after which a request that keeps failing stops the run.",
        "Generation",
    )
    vllm_gpu_memory_utilization: float = option(
        0.3, "`colocate`: the share of the GPU's memory that vLLM takes.", "Generation"
    )
    vllm_weights_dir: str | None = option(
        None,
        "Folder through which vLLM is given the student's weights, seen by both under this name; by default "
        "`vllm-weights` in output_dir. In memory (/dev/shm) it is fastest.",
        "Generation",
    )
    vllm_importance_sampling_correction: bool = option(
        True,
        "Weight policy gradients by the student's probability of a token over that of what sampled it: vLLM, or the "
        "student of some steps ago (rollout_ahead).",
        "Generation",
    )
    vllm_importance_sampling_clip_max: float = option(3.0, "The largest such weight.", "Generation")

    # Objective
    objective: str | list[Any] = option(
        "auto",
        "Name of an objective, or a list of {name, weight, options}; `diglot objectives` lists them, and one of your "
        "own is package.module:Class. `auto`: GKD takes jsd on equal vocabularies, else covering; MiniLLM its own "
        "single-step part.",
        "Objective",
    )
    kd_temperature: float = option(1.0, "Temperature of both distributions inside the divergence.", "Objective")
    strict_top_k: int = option(
        16, "`strict`: how many of the student's likeliest shared tokens a row compares, 0: all.", "Objective"
    )
    vocabulary_path: str = option(
        "auto",
        "`auto` takes the shorter same-vocabulary path when both tables are equal; `general` never does.",
        "Objective",
        choices=["auto", "general"],
    )
    rows_per_chunk: int | None = option(
        None, "Rows of logits that exist at a time; chosen from free memory when not given.", "Objective"
    )
    min_coverage: float = option(
        0.5,
        "Stop when the share of the tokens written in a step that could be aligned falls below this.",
        "Objective",
    )

    # Training
    on_nonfinite: str = option(
        "stop",
        "If a loss or gradient is not finite: `stop` the run, or `skip` the step and count it. The batch is saved.",
        "Training",
        choices=["stop", "skip"],
    )

    # Logging
    log_completions: bool = option(False, "Print sampled completions as a table.", "Logging")
    log_completions_steps: int = option(100, "Print completions every so many steps.", "Logging")
    num_completions_to_print: int = option(3, "How many completions a table shows.", "Logging")

    log_rollouts: int = option(
        4,
        "Sampled completions that each logged step writes to rollouts.jsonl, scored by both models; 0: none.",
        "Logging",
    )

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled holds no keys."""
        return {k: None if is_secret(k) else without_secrets(v) for k, v in vars(self).items()}

    def __post_init__(self) -> None:
        for one in fields(self):
            if "group" in one.metadata:  # those of Diglot; the Trainer has its own ways with the others
                check_kind(one.name, getattr(self, one.name), one.type)
        check_ranges(vars(self))
        check_texts(vars(self))
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("_per_byte"):
            self.greater_is_better = False  # bits and nats; the Trainer takes for less only what is called a loss
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name in {one.name for one in fields(self)}.intersection(_MAPPINGS):  # older transformers have fewer
            setattr(self, name, as_mapping(name, getattr(self, name)))
        self._check_server()
        self._check_vllm()
        for one in fields(self):
            choices = one.metadata.get("choices")
            if choices and getattr(self, one.name) is not None:
                one_of(one.name, getattr(self, one.name), choices)
        if self.max_length is not None and self.max_completion_length >= self.max_length:
            raise ConfigError(
                f"max_completion_length={self.max_completion_length} leaves nothing for the prompt within "
                f"max_length={self.max_length}. Raise max_length or lower max_completion_length."
            )

    @property
    def steps_per_window(self) -> int:
        """How many optimizer steps a set of completions serves."""
        return 1

    def _check_server(self) -> None:
        if self.teacher_model_server_url is not None:
            checked_address(self.teacher_model_server_url, "teacher_model_server_url")
        if is_address(self.teacher_model_name_or_path):  # from here on it is written into files: no secrets in it
            checked_address(str(self.teacher_model_name_or_path), "teacher_model_name_or_path")

    def _check_vllm(self) -> None:
        host = self.vllm_server_host
        _require(re.fullmatch(r"[\w.-]+", host) is not None, "vllm_server_host", host, "a host's name or address alone")
        if self.vllm_server_base_url is not None:
            checked_address(self.vllm_server_base_url, "vllm_server_base_url", "DIGLOT_VLLM_API_KEY")


@dataclass
class GKDConfig(DistillationConfig):
    """Options of `GKDTrainer` (generalised knowledge distillation, arXiv 2306.13649)."""

    lmbda: float = option(
        0.5, "Share of steps on the student's own completions (one draw a step, the same on all ranks).", "Objective"
    )
    beta: float | None = option(
        None,
        "The divergence, of every objective that has one: 0 is forward KL(teacher || student), 1 is reverse "
        "KL(student || teacher), between them the generalised Jensen-Shannon divergence. Default: each objective's "
        "own, 0.5 of `covering` and `jsd`.",
        "Objective",
    )
    teacher_cache_dir: str | None = option(
        None,
        "Folder in which to keep what the teacher says about completions of the dataset, so that later epochs and runs "
        "need not ask again: its hidden states, (scored tokens) x (hidden size) x (bytes of its dtype) for each text. "
        "It takes half of the free disk at most; delete it whenever you like. Nothing that is sampled is kept. "
        "The objective `covering` asks the teacher anew for texts in which it reads branches.",
        "Teacher",
    )
    seq_kd: bool = option(
        False, "On off-policy steps the teacher writes the completion and the student re-reads it.", "Objective"
    )
    max_new_tokens: int | None = option(None, "Another name of max_completion_length, as in TRL's GKD.", "Generation")

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            default = next(f for f in fields(self) if f.name == "max_completion_length").default
            if self.max_completion_length not in (default, self.max_new_tokens):
                raise ConfigError(
                    f"max_new_tokens={self.max_new_tokens} and max_completion_length={self.max_completion_length} are "
                    "two names of one option and differ. Give one of them."
                )
            self.max_completion_length = self.max_new_tokens
        super().__post_init__()
        if self.rollout_ahead and self.lmbda == 0:
            raise ConfigError(
                f"rollout_ahead={self.rollout_ahead} has the student write ahead, and with lmbda=0 it never writes. "
                "Raise lmbda, or drop it."
            )
        self._check_writers()

    def _check_writers(self) -> None:
        """Refuse what says how somebody writes, where nobody ever does."""
        if self.lmbda == 0:
            idle = ("num_generations", "use_vllm")  # temperature and nucleus are those of logged answers, too
            for one in (one for one in fields(self) if one.name in idle and getattr(self, one.name) != one.default):
                raise ConfigError(
                    f"{one.name}={getattr(self, one.name)!r} says how the student writes, and with lmbda=0 all texts "
                    f"are the {'teacher' if self.seq_kd else 'data'}'s. Raise lmbda, or drop it."
                )
        if self.teacher_cache_dir is not None and (self.lmbda == 1 or self.seq_kd):
            raise ConfigError(
                f"teacher_cache_dir={self.teacher_cache_dir!r} keeps what the teacher says about completions of the "
                f"data, and lmbda={self.lmbda} with seq_kd={self.seq_kd} leaves no step that reads one. Drop it."
            )
        if self.seq_kd and self.lmbda == 1:
            raise ConfigError(
                "seq_kd=True says who writes in off-policy steps, and lmbda=1.0 leaves none. Lower lmbda, or drop it."
            )


@dataclass
class MiniLLMConfig(DistillationConfig):
    """Options of `MiniLLMTrainer` (arXiv 2306.08543). Every term can be switched off; the defaults are the authors'."""

    rkl_advantage: bool = option(True, "The policy-gradient term (the paper's long part).", "Objective")
    single_step_decomposition: bool = option(
        True,
        "The single-step part as an exact divergence on every row where both next tokens can be compared.",
        "Objective",
    )
    gamma: float = option(0.95, "Discount of later rewards, per aligned chunk.", "Objective")
    length_normalization: bool = option(True, "Divide a return by the number of chunks it sums.", "Objective")
    whiten_advantages: bool = option(True, "Zero mean and unit variance of advantages over a step.", "Objective")
    reward_clip: float = option(100.0, "Rewards (nats) are clipped to this range on both sides.", "Objective")
    epsilon: float = option(0.2, "PPO clip range of the probability ratio.", "Objective")
    num_iterations: int = option(4, "Optimizer steps on each set of completions (inner epochs).", "Objective")
    teacher_mixed_alpha: float = option(
        0.2,
        "Share of the teacher in teacher-mixed sampling. Equal vocabularies: every token is drawn from the mixture. "
        "Others: with this probability the teacher writes a prefix that the student continues.",
        "Generation",
    )
    lm_coef: float = option(
        1.0, "Weight of the language-modelling loss on `lm_dataset`, when one is given.", "Objective"
    )

    @property
    def steps_per_window(self) -> int:
        return self.num_iterations

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.rkl_advantage or self.single_step_decomposition):
            raise ConfigError(
                "rkl_advantage=False and single_step_decomposition=False leave nothing of MiniLLM. Switch one "
                "of them on."
            )
