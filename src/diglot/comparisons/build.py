"""From names and options to a student, and one comparison with each teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diglot.batches import PairReader
from diglot.comparisons.comparison import Comparison
from diglot.comparisons.connect import connect_teacher, scored_teacher
from diglot.comparisons.rows import check_route
from diglot.comparisons.scores import check_temperature
from diglot.comparisons.terms import Term, check_level
from diglot.data import Sample
from diglot.errors import ConfigError
from diglot.objectives import Level, Pair
from diglot.options import DistillationConfig, TeacherOptions
from diglot.phases import phase
from diglot.rendering import Renderer, Role
from diglot.teachers import LocalTeacher, Teacher, find_teacher_tokenizer
from diglot.teachers.adapter import OWN_BASE, AdapterOff
from diglot.teachers.loading import INERT, load_language_model, load_teacher_model, split_gguf
from diglot.vocabulary import load_tokenizer

Tokenizer = PreTrainedTokenizerBase


def load_student(
    student: PreTrainedModel | str, tokenizer: Tokenizer | None, args: DistillationConfig, *, frozen: bool = False
) -> tuple[PreTrainedModel, Renderer]:
    """The student and what it reads; its tokenizer is by default the one beside its weights.

    Given by name it is loaded in float32, whatever its file holds, unless `args.model_init_kwargs` say otherwise; a
    `frozen` one, below an adapter, in the file's own number type.

    Raises:
        ConfigError: arguments for loading a model or a tokenizer that is loaded already.
        VocabularyError: a tokenizer that does not belong to its model, or whose bytes cannot be known.
    """
    if isinstance(student, str):
        init = _kwargs(args.model_init_kwargs)
        default = {} if {"dtype", "torch_dtype"} & init.keys() else {"dtype": "auto" if frozen else torch.float32}
        with phase(f"Loading the student {student}"):
            student = load_language_model(student, **{**INERT, **default, **init})
    elif args.model_init_kwargs:
        raise ConfigError("model_init_kwargs is for a student given by name; this one is already a model. Drop it.")
    _refuse("tokenizer_kwargs", args.tokenizer_kwargs, "student's tokenizer", tokenizer)
    keep_trainable(student)
    if tokenizer is None:
        tokenizer = load_tokenizer(student.config._name_or_path, _kwargs(args.tokenizer_kwargs))
    return student, _renderer(student, tokenizer, args.chat_template_kwargs, args, "student")


def keep_trainable(student: PreTrainedModel) -> None:
    """Weights in 4 bits stay in the form that gradients pass through.

    On CPUs with AVX512-BF16 bitsandbytes packs them anew at the first pass in evaluation mode, and what is packed so
    passes no gradient on: a sample, and the adapters below would stop learning, with a warning of torch's at most.
    """
    for module in student.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def prepare_comparisons(
    student: PreTrainedModel,
    renderer: Renderer,
    teacher: Any,
    teacher_tokenizer: Tokenizer | Sequence[Tokenizer | None] | None,
    args: DistillationConfig,
) -> list[Comparison]:
    """One comparison, without terms yet, for each teacher that is asked for.

    Raises:
        ConfigError: no teacher, an empty list, or options of one that cannot work.
        TeacherError: a teacher's tokenizer cannot be known.
    """
    named = args.teacher_model_name_or_path if teacher is None else teacher
    if not isinstance(named, (list, tuple)):
        assert not isinstance(teacher_tokenizer, (list, tuple))
        options = TeacherOptions.of(teacher, args)
        return [_compare(student, renderer, options, teacher_tokenizer, args)]
    tokenizers: Any = teacher_tokenizer
    if not isinstance(tokenizers, (list, tuple)):
        tokenizers = [tokenizers] * len(named)
    if not named or len(tokenizers) != len(named):
        raise ConfigError(f"There are {len(named)} teachers and {len(tokenizers)} tokenizers of them: give one each.")
    several = TeacherOptions.of_list(named, args)
    total = sum(one.weight for one in several)
    comparisons = []
    for options, own in zip(several, tokenizers, strict=True):
        made = _compare(student, renderer, options, own, args)
        made.reader.label = options.label
        comparisons.append(replace(made, weight=options.weight / total))
    for one in comparisons:
        one.reader.others = tuple(other.reader for other in comparisons if other is not one)
    return comparisons


def _compare(
    student: PreTrainedModel, renderer: Renderer, options: TeacherOptions, tokenizer: Any, args: DistillationConfig
) -> Comparison:
    _check_loaded(options, tokenizer)
    frozen: Teacher | None = connect_teacher(options, tokenizer, args) or scored_teacher(options, tokenizer, args)
    if frozen is None:
        frozen = _local_teacher(options, tokenizer, args, student, renderer)
    mine, theirs = renderer, frozen.renderer
    with phase("Comparing the vocabularies"):
        pair = Pair.of_renderers(mine, theirs)
    reader = PairReader(
        mine,
        theirs,
        same_vocabulary=pair.same and args.vocabulary_path == "auto",
        max_length=args.max_length,
        teacher_max_length=frozen.max_length,
        score_turns="all" if args.score_turns == "all" else "last",
        teacher_system=options.system_prompt,
    )
    unscored = {Role.REASONING: args.score_reasoning, Role.TOOL_CALL: args.score_tool_calls}
    return Comparison(
        options.label,
        1.0,
        reader,
        frozen,
        pair,
        temperature=args.kd_temperature,
        rows_per_chunk=args.rows_per_chunk,
        unscored_roles=frozenset(role for role, scored in unscored.items() if not scored),
    )


def _check_loaded(options: TeacherOptions, tokenizer: Tokenizer | None) -> None:
    """Raise `ConfigError` for options that say how to load a model or a tokenizer that is loaded already."""
    model = None if isinstance(options.name, str) else options.name
    both = None if model is None else tokenizer  # beside the name of a model these say what else to load
    held = [
        ("teacher_model_init_kwargs", options.init_kwargs, "teacher's model", model),
        ("teacher_tokenizer_kwargs", options.tokenizer_kwargs, "teacher's tokenizer", tokenizer),
        ("teacher_tokenizer_name_or_path", options.tokenizer, "teacher's tokenizer", both),
        ("teacher_model_revision", options.revision, "teacher", both),
    ]
    for entry in held:
        _refuse(*entry)


def _refuse(option: str, value: Any, what: str, loaded: Any) -> None:
    if value and loaded is not None:
        raise ConfigError(
            f"{option}={value!r} says how to load the {what}, and a {type(loaded).__name__} was passed. Drop one "
            "of them."
        )


def _check_weights(student: PreTrainedModel, teacher: torch.nn.Module) -> None:
    """Raise `ConfigError` for a teacher with weights of the student's, and for a model whose weights are nowhere.

    A teacher is frozen, which would freeze the student too; below an adapter it would follow the student, at a loss of
    zero all the time.
    """
    own = {id(p) for p in student.parameters()}
    if any(id(p) in own for p in teacher.parameters()):
        raise ConfigError(
            "The teacher's model shares weights with the student's: it would be frozen, or trained, with it. Pass a "
            f"model of its own (copy.deepcopy), or {OWN_BASE!r} as the teacher of a student with an adapter."
        )
    for side, model in (("student", student), ("teacher", teacher)):
        nowhere = [name for name, p in model.named_parameters() if p.is_meta]
        if nowhere and not hasattr(model, "hf_device_map"):  # weights that Accelerate fetches when they are needed
            raise ConfigError(
                f"{len(nowhere)} weights of the {side} are on the device 'meta' ({nowhere[0]}), where they have no "
                "values. Load it with from_pretrained, outside of torch.device('meta') and init_empty_weights."
            )


def _local_teacher(
    options: TeacherOptions, tokenizer: Any, args: DistillationConfig, student: PreTrainedModel, renderer: Renderer
) -> LocalTeacher:
    name, kwargs = options.name_or_path, options.chat_template_kwargs
    if name == OWN_BASE:
        if options.init_kwargs:
            raise ConfigError(
                f"teacher_model_init_kwargs loads weights, and the teacher {OWN_BASE!r} has none. Drop it."
            )
        own = _renderer(student, tokenizer or renderer.tokenizer, kwargs, args, "teacher")
        return AdapterOff(student, own, options.max_length)
    model = _load(options.name, options, args) if options.name is None or name else options.name
    _check_weights(student, model)
    if tokenizer is None:
        place, init = split_gguf(name, options.init_kwargs or {}) if name else (None, {})
        tokenizer = find_teacher_tokenizer(
            model,
            tokenizer_name_or_path=options.tokenizer,
            model_name_or_path=place,
            gguf_file=init.get("gguf_file"),
            student_name_or_path=student.config._name_or_path,
            student_tokenizer=renderer.tokenizer,
            revision=options.revision,
            trust_remote_code=args.teacher_trust_remote_code,
            arguments=options.tokenizer_kwargs,
        )
    return LocalTeacher(model, _renderer(model, tokenizer, kwargs, args, "teacher"), options.max_length)


def complete(
    comparison: Comparison, terms: Sequence[Term], student: PreTrainedModel, args: DistillationConfig
) -> Comparison:
    """The comparison with its terms, for which the teacher is known to give enough.

    Raises:
        TeacherError: a term needs more of the teacher than it gives.
        ConfigError: a temperature that its numbers do not have, or references that are missing.
    """
    teacher = comparison.teacher
    check_level(terms, teacher.level, getattr(teacher, "also", ()))
    if teacher.level < Level.HIDDEN:
        if any(term.objective.at_temperature for term in terms):
            check_temperature(args.kd_temperature, "log-probs")
        teacher.want(max((term.objective.top for term in terms), default=0))
    return replace(comparison, terms=tuple(terms), references=_references(comparison, terms, student, args))


def _references(
    comparison: Comparison, terms: Sequence[Term], student: PreTrainedModel, args: DistillationConfig
) -> tuple[LocalTeacher, LocalTeacher] | None:
    """The student before training and the reference teacher, if a term reads their log-probabilities."""
    asking = [t.name for t in terms if t.objective.reads_references]
    if not asking:
        return None
    name, start = args.reference_teacher_model_name_or_path, args.reference_model_name_or_path
    start = start or student.config._name_or_path
    if not name or not start:
        raise ConfigError(
            f"Objective {asking[0]!r} with reference_alpha compares with two references; the teacher's is {name!r}, "
            f"the student's {start!r}. Give reference_teacher_model_name_or_path (a small model with the teacher's "
            "tokenizer) and reference_model_name_or_path (the student before training)."
        )
    renderers = comparison.reader.student, comparison.teacher.renderer
    models = (
        load_language_model(start, **{**INERT, **_kwargs(args.model_init_kwargs)}),
        _load(name, TeacherOptions.of(name, args), args),
    )
    options = "reference_model_name_or_path", "reference_teacher_model_name_or_path"
    for model, renderer, option in zip(models, renderers, options, strict=True):
        rows: Any = model.get_input_embeddings()
        if rows.num_embeddings < int((~renderer.vocabulary.control).nonzero()[0].max(initial=0)) + 1:
            raise ConfigError(
                f"{option} has {rows.num_embeddings} embedding rows, the {renderer.name}'s vocabulary "
                f"{len(renderer.vocabulary)}: a reference must read the same tokens. Choose a model of the same family."
            )
    of_teacher = LocalTeacher(models[1], renderers[1], comparison.teacher.max_length)
    return LocalTeacher(models[0], renderers[0]), of_teacher


def describe(comparison: Comparison) -> str:
    """What was found about the pair, in a few sentences for the log."""
    mine, theirs = comparison.reader.student.vocabulary, comparison.teacher.renderer.vocabulary
    terms = ", ".join(f"{term.weight:g} x {term.name}" for term in comparison.terms) or "none"
    if comparison.pair.same:
        about = f"Student and teacher have the same vocabulary. {mine.padding_note(theirs)}".strip()
    else:
        about = (
            f"The vocabularies differ ({mine.explain_difference(theirs)}); {len(comparison.pair.shared_s)} tokens are "
            "shared. Completions are aligned by their bytes, and the teacher reads its own tokens of them in its own "
            "template."
        )
    return f"{about} Terms of the loss: {terms}."


def routes(comparisons: Sequence[Comparison], samples: Sequence[Sample]) -> bool:
    """Do the rows of a window say which teacher reads them?

    Raises:
        DataError: a row names a teacher that there is not, or some rows name one and others do not.
    """
    named = {s.conversation.route: s.where for s in samples}
    if len(comparisons) == 1 or set(named) == {None}:
        return False
    labels = [one.label for one in comparisons]
    for route, where in named.items():
        check_route(route, labels, where)
    return True


def mean_metrics(measured: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Weighted means of the comparisons' metrics, over those that have one: a route may lead no row to a teacher."""
    means = {}
    for name in dict.fromkeys(name for _, one in measured for name in one):
        known = [(weight, one[name]) for weight, one in measured if not math.isnan(one.get(name, math.nan))]
        total = sum(weight for weight, _ in known)
        means[name] = sum(weight * value for weight, value in known) / total if total else math.nan
    return means


def _load(name: Any, options: TeacherOptions, args: DistillationConfig) -> PreTrainedModel:
    if name is None:
        raise ConfigError("There is no teacher. Pass teacher_model or set teacher_model_name_or_path.")
    trust = args.teacher_trust_remote_code
    with phase(f"Loading the teacher {name}"):
        return load_teacher_model(name, options.init_kwargs or {}, revision=options.revision, trust_remote_code=trust)


def _renderer(
    model: PreTrainedModel, tokenizer: Tokenizer, template_kwargs: Any, args: DistillationConfig, name: str
) -> Renderer:
    options = dict(fold_system=args.fold_system, markers=args.markers, name=name)
    return Renderer.of_model(model, tokenizer, chat_template_kwargs=template_kwargs, **options)


def _kwargs(kwargs: dict[str, Any] | str | None) -> dict[str, Any]:
    """Options that the configuration has read from JSON, if they came as text."""
    return kwargs if isinstance(kwargs, dict) else {}
