"""The model card of a student: what the hub reads, and a page for people. Nothing of this machine is in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from diglot.report.runs import Run
from diglot.report.verdict import Z

PAPERS = {  # of methods and objectives: title, arXiv number; docs/papers.md says more
    "GKD": ("On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", "2306.13649"),
    "MiniLLM": ("MiniLLM: Knowledge Distillation of Large Language Models", "2306.08543"),
    "covering": ("Exact Byte-Level Probabilities from Tokenized Language Models", "2410.09303"),
    "uld": ("Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss", "2402.12030"),
    "alm": ("Approximate likelihood matching", "2503.20083"),
    "bpm": ("BPM", "2607.22334"),
    "escd": ("ESCD", "2609.34738"),
    "xtoken_p": ("X-Token", "2605.21699"),
    "xtoken_h": ("X-Token", "2605.21699"),
    "simct": ("SimCT", "2605.07711"),
    "dskd": ("Dual-space knowledge distillation", "2406.17328"),
}

_TEMPLATE = (Path(__file__).parent / "templates" / "card.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class TeacherFacts:
    """One teacher as a card shows it.

    Args:
        name: a repository of the hub, or a path, of which only the last part is shown.
        objectives: name -> weight of each term of the loss.
        vocabulary: one line on its tokenizer.
        relation: how its vocabulary differs from the student's; empty if it does not.
    """

    name: str
    objectives: Mapping[str, float]
    vocabulary: str
    relation: str


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a student.

    Args:
        student: what was trained: a repository of the hub, or a path; empty for a model that has neither.
        method: "GKD" or "MiniLLM".
        adapter: are the files an adapter, which is loaded with PEFT?
        datasets: repositories or files; empty where nobody said.
        rows: of the data; None for streams.
        options: name -> value of the options that matter.
        vocabulary: one line on the student's tokenizer.
        run: what the run measured of itself, for the results.
    """

    model_name: str
    student: str
    teachers: Sequence[TeacherFacts]
    method: str
    vocabulary: str
    versions: str
    adapter: bool = False
    datasets: Sequence[str] = ()
    rows: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    run: Run | None = None
    tags: Sequence[str] = ()
    language: str | None = None
    license: str | None = None


def hub_name(name: str) -> str | None:
    """`name` if it can be a repository of the hub and is no file or folder here, which would have been loaded."""
    if Path(name).expanduser().exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def shown_name(name: str) -> str:
    """How a model is called on a page: a repository as on the hub, of a path its last part."""
    return hub_name(name) or Path(name).name or name


def model_card(facts: CardFacts) -> ModelCard:
    """A card whose metadata the hub accepts: `base_model` and `datasets` are repositories or absent."""
    base, teachers = hub_name(facts.student), [one for t in facts.teachers if (one := hub_name(t.name))]
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if facts.adapter else "finetune",
        datasets=[one for name in facts.datasets if (one := hub_name(name))] or None,
        language=facts.language,
        library_name="peft" if facts.adapter else "transformers",
        license=facts.license,
        pipeline_tag="text-generation",
        tags=["diglot", facts.method.lower(), "on-policy-distillation", *facts.tags],
        teacher=teachers or None,
    )
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        model_name=facts.model_name,
        student=_link(facts.student, "https://huggingface.co/"),
        teachers=[_link(t.name, "https://huggingface.co/") for t in facts.teachers],
        cell=lambda text: str(text).replace("|", "\\|"),
        data=", ".join(_link(name, "https://huggingface.co/datasets/") for name in facts.datasets),
        facts=facts,
        objectives=[" + ".join(_term(t, weight) for t, weight in one.objectives.items()) for one in facts.teachers],
        results=_results(facts.run),
        papers=_papers(facts),
    )
    return card


def _link(name: str, site: str) -> str:
    """A link to a repository; of a path its last part, of nothing that it has no name."""
    if not name:
        return "a model without a name"
    repository = hub_name(name)
    return f"[{repository}]({site}{repository})" if repository else f"`{shown_name(name)}` (not on the hub)"


def _term(name: str, weight: float) -> str:
    return f"`{name}`" if weight == 1 else f"{weight:g} x `{name}`"


def _papers(facts: CardFacts) -> dict[str, tuple[str, str]]:
    """Name -> title and number, each paper once."""
    names = [facts.method, *(name.split("#")[0] for t in facts.teachers for name in t.objectives)]
    return {name: PAPERS[name] for name in dict.fromkeys(names) if name in PAPERS}


def _results(run: Run | None) -> list[tuple[str, str, str, str]]:
    """(what, before, after, change), with 95% intervals where the noise was measured; empty without both ends."""
    lines = []
    for title, name, error in (
        ("distance to the teacher, nats per byte of the student's own answers", "kl_nats_per_byte", "kl_error"),
        ("the data's own replies, bits per byte", "bits_per_byte", "bits_per_byte_error"),
    ):
        before, after = run.before_after(f"fixed/{name}") if run else (None, None)
        if run is None or before is None or after is None:
            continue
        first, last = run.before_after(f"fixed/{error}")
        both = None if first is None or last is None else math.hypot(first, last)
        cells = (_with_noise(before, first), _with_noise(after, last), _with_noise(after - before, both, sign="+"))
        lines.append((title, *cells))
    return lines


def _with_noise(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if error is None or math.isnan(error) else f" ± {Z * error:.3f}")
