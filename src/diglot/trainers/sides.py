"""From names and options to two models that can be trained against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from diglot.batches import AlignedBatch, PairReader
from diglot.errors import ConfigError
from diglot.heads import token_logps
from diglot.objectives import Pair, PathObjective
from diglot.rendering import Renderer
from diglot.teachers import LocalTeacher, Teacher, find_teacher_tokenizer
from diglot.teachers.adapter import OWN_BASE, AdapterOff
from diglot.teachers.loading import INERT, load_language_model, load_teacher_model, split_gguf
from diglot.trainers.config import DistillationConfig
from diglot.trainers.connect import connect_teacher
from diglot.trainers.scored import kept_teacher
from diglot.trainers.terms import Term


@dataclass(frozen=True)
class Sides:
    """Student and teacher, what each reads, and what their vocabularies are to each other."""

    student: PreTrainedModel
    renderer: Renderer  # the student's
    teacher: Teacher
    pair: Pair
    same_vocabulary: bool  # take the path of equal tables
    reader: PairReader


def prepare_sides(
    student: PreTrainedModel | str,
    teacher: PreTrainedModel | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    args: DistillationConfig,
) -> Sides:
    """Load what is given by name, find both tokenizers, and say which path the pair takes.

    Raises:
        ConfigError: no teacher, or arguments for loading a model that is loaded already.
        TeacherError: the teacher's tokenizer cannot be known.
        VocabularyError: a tokenizer that does not belong to its model, or whose bytes cannot be known.
    """
    student = _load_student(student, args)
    _keep_trainable(student)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(student.config._name_or_path)
    renderer = _renderer(student, tokenizer, args.chat_template_kwargs, "student")
    frozen: Teacher | None = connect_teacher(teacher, teacher_tokenizer, args)
    frozen = frozen or kept_teacher(teacher, teacher_tokenizer, args)
    if frozen is None:
        frozen = _local_teacher(teacher, teacher_tokenizer, args, student, tokenizer)
    renderer_t = frozen.renderer
    pair = Pair.of(
        renderer.vocabulary,
        renderer_t.vocabulary,
        renderer.stop_ids,
        renderer_t.stop_ids,
        renderer.encoder.encode,
        renderer_t.encoder.encode,
    )
    same = pair.same and args.vocabulary_path == "auto"
    reader = PairReader(
        renderer,
        renderer_t,
        same_vocabulary=same,
        max_length=args.max_length,
        teacher_max_length=frozen.max_length,
        score_turns="all" if args.score_turns == "all" else "last",
        teacher_system=args.teacher_system_prompt,
    )
    return Sides(student, renderer, frozen, pair, same, reader)


def _local_teacher(
    teacher: PreTrainedModel | str | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    args: DistillationConfig,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> LocalTeacher:
    name = args.name_of(teacher)
    assert not isinstance(name, list)  # `prepare_lanes` takes lists apart
    if name == OWN_BASE:
        return _own_base(student, teacher_tokenizer or tokenizer, args)
    model = _load_teacher(name, args) if isinstance(teacher, str) or teacher is None else teacher
    if teacher_tokenizer is None:
        place, kwargs = split_gguf(name, _kwargs(args.teacher_model_init_kwargs)) if name else (None, {})
        teacher_tokenizer = find_teacher_tokenizer(
            model,
            tokenizer_name_or_path=args.teacher_tokenizer_name_or_path,
            model_name_or_path=place,
            gguf_file=kwargs.get("gguf_file"),
            student_name_or_path=student.config._name_or_path,
            student_tokenizer=tokenizer,
            revision=args.teacher_model_revision,
            trust_remote_code=args.teacher_trust_remote_code,
        )
    renderer = _renderer(model, teacher_tokenizer, args.teacher_chat_template_kwargs, "teacher")
    return LocalTeacher(model, renderer, args.teacher_max_length)


def _own_base(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig) -> AdapterOff:
    """The student without its adapter."""
    if args.teacher_model_init_kwargs:
        raise ConfigError(f"teacher_model_init_kwargs loads weights, and the teacher {OWN_BASE!r} has none. Drop it.")
    renderer = _renderer(student, tokenizer, args.teacher_chat_template_kwargs, "teacher")
    return AdapterOff(student, renderer, args.teacher_max_length)


def load_references(
    sides: Sides, terms: Sequence[Term], args: DistillationConfig
) -> tuple[LocalTeacher, LocalTeacher] | None:
    """The student before training and the reference teacher, if a term reads their log-probabilities.

    Raises `ConfigError` if one does and no reference teacher is named, or it reads other tokens than the teacher.
    """
    asking = [t.name for t in terms if isinstance(t.objective, PathObjective) and t.objective.reads_references]
    if not asking:
        return None
    name, start = args.reference_teacher_model_name_or_path, args.reference_model_name_or_path
    start = start or sides.student.config._name_or_path
    if not name or not start:
        raise ConfigError(
            f"Objective {asking[0]!r} with reference_alpha compares with two references; the teacher's is {name!r}, "
            f"the student's {start!r}. Give reference_teacher_model_name_or_path (a small model with the teacher's "
            "tokenizer) and reference_model_name_or_path (the student before training)."
        )
    own = _load_teacher(name, args)
    renderers = sides.renderer, sides.teacher.renderer
    models = load_language_model(start, **{**INERT, **_kwargs(args.model_init_kwargs)}), own
    for model, renderer, option in zip(
        models, renderers, ("reference_model_name_or_path", "reference_teacher_model_name_or_path"), strict=True
    ):
        rows: Any = model.get_input_embeddings()
        if rows.num_embeddings < int((~renderer.vocabulary.control).nonzero()[0].max(initial=0)) + 1:
            raise ConfigError(
                f"{option} has {rows.num_embeddings} embedding rows, the {renderer.name}'s vocabulary "
                f"{len(renderer.vocabulary)}: a reference must read the same tokens. Choose a model of the same family."
            )
    return LocalTeacher(models[0], renderers[0]), LocalTeacher(models[1], renderers[1], sides.teacher.max_length)


@torch.no_grad()
def reference_logps(
    references: Sequence[LocalTeacher], batch: AlignedBatch, pair: Pair, stop_as_set: bool, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """Log-probs of a batch's text, nats, [N_s] and [N_t], under what `load_references` gave."""
    found = []
    for model, side, stop in zip(references, (batch.student, batch.teacher), (pair.stop_s, pair.stop_t), strict=True):
        ends = side.stop if stop_as_set else torch.zeros_like(side.stop)
        found.append(token_logps(model.hidden(side), model.head, side.targets, ends, stop, chunk_rows))
    return found[0], found[1]


def describe(sides: Sides) -> str:
    """What was found about the pair, in a few sentences for the log."""
    mine, theirs = sides.renderer.vocabulary, sides.teacher.renderer.vocabulary
    if sides.pair.same:
        return f"Student and teacher have the same vocabulary. {mine.padding_note(theirs)}".strip()
    shared = len(sides.pair.shared_s)
    return (
        f"The vocabularies differ ({mine.explain_difference(theirs)}); {shared} tokens are shared. Completions are "
        "aligned by their bytes, and the teacher reads its own tokens of them in its own template."
    )


def _load_student(student: PreTrainedModel | str, args: DistillationConfig) -> PreTrainedModel:
    if isinstance(student, str):
        student = load_language_model(student, **{**INERT, **_kwargs(args.model_init_kwargs)})
    elif args.model_init_kwargs:
        raise ConfigError("model_init_kwargs is for a student given by name; this one is already a model. Drop it.")
    if args.disable_dropout:
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return student


def _keep_trainable(student: PreTrainedModel) -> None:
    """Weights in 4 bits stay in the form that gradients pass through.

    On CPUs with AVX512-BF16 bitsandbytes packs them anew at the first pass in evaluation mode, and what is packed so
    passes no gradient on: a sample, and the adapters below would stop learning, with a warning of torch's at most.
    """
    for module in student.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _load_teacher(name: str | None, args: DistillationConfig) -> PreTrainedModel:
    if name is None:
        raise ConfigError("There is no teacher. Pass teacher_model or set teacher_model_name_or_path.")
    return load_teacher_model(
        name,
        _kwargs(args.teacher_model_init_kwargs),
        revision=args.teacher_model_revision,
        trust_remote_code=args.teacher_trust_remote_code,
    )


def _renderer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template_kwargs: Any, name: str) -> Renderer:
    embeddings: Any = model.get_input_embeddings()
    return Renderer(
        tokenizer,
        num_embeddings=embeddings.num_embeddings,
        generation_config=model.generation_config,
        chat_template_kwargs=template_kwargs,
        name=name,
    )


def _kwargs(given: dict[str, Any] | str | None) -> dict[str, Any]:
    """Options that `TrainingArguments` has read from JSON, if they came as text."""
    return given if isinstance(given, dict) else {}
