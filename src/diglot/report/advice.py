"""Signs that a run goes wrong, read off its logged metrics, each with what to do about it. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from statistics import median
from typing import Any

History = Sequence[Mapping[str, Any]]

WINDOW = 3  # logs at either end whose median is compared: one odd log is no trend


@dataclass(frozen=True)
class Advice:
    """One warning. `name` is stable, `text` says what was seen and what to do."""

    name: str
    step: int
    text: str


def advise(history: History) -> list[Advice]:
    """What the last logs say, at most one advice of each kind. `history` holds one mapping per log, oldest first."""
    return [advice for rule in RULES if (advice := rule(history)) is not None]


def all_advice(history: History) -> list[Advice]:
    """What was said over a whole run: each kind once, at the log where it was first true, or where the run said it."""
    logged = [Advice(e["warning"], int(e["step"]), str(e["text"])) for e in history if "warning" in e]
    by_name: dict[str, Advice] = {one.name: one for one in reversed(logged)}
    for end in range(1, len(history) + 1):
        for one in advise(history[:end]):
            by_name.setdefault(one.name, one)
    return list(by_name.values())


def rule(text_of: Callable[[History], str | None]) -> Callable[[History], Advice | None]:
    """A rule gives a text, or None; the advice has the rule's name and belongs to the last log."""

    @wraps(text_of)
    def advised(history: History) -> Advice | None:
        text = text_of(history)
        return None if text is None else Advice(text_of.__name__, int(history[-1].get("step", 0)), text)

    return advised


@rule
def coverage_falling(history: History) -> str | None:
    """The share of tokens that can be aligned is 5 points lower than it was."""
    ends = _ends(history, "align/coverage")
    if ends is None or ends[1] > ends[0] - 0.05:
        return None
    return (
        f"Alignment coverage fell from {ends[0]:.1%} to {ends[1]:.1%}: a growing share of what the student writes "
        "carries no signal. Look at rollouts.jsonl for broken characters or control tokens; a lower learning rate or "
        "temperature keeps the student on text."
    )


@rule
def repetition(history: History) -> str | None:
    """Completions repeat themselves: over 30% of their windows, and 15 points more than at first."""
    ends = _ends(history, "completions/repetition")
    if ends is None or ends[1] < 0.3 or ends[1] < ends[0] + 0.15:
        return None
    return (
        f"{ends[1]:.0%} of the completions' text repeats what stands before it, {ends[0]:.0%} at first. Loops are "
        "likely text under many teachers, and a divergence on the student's own text rewards them. Mix in the "
        "dataset's completions (lmbda below 1), move beta towards 0, or shorten max_completion_length."
    )


@rule
def length_collapse(history: History) -> str | None:
    """Completions are less than a third as long as they were."""
    ends = _ends(history, "completions/mean_bytes")
    if ends is None or ends[1] > ends[0] / 3:
        return None
    return (
        f"Completions shrank from {ends[0]:.0f} to {ends[1]:.0f} bytes. Short text has a small divergence, and "
        "reverse KL over whole texts rewards stopping. Check that the teacher's stop is read as the student's (stop "
        "agreement), and keep length_normalization on (MiniLLM) or lower the learning rate."
    )


@rule
def stop_disagreement(history: History) -> str | None:
    """Both sides' stop probabilities overlap 20 points less than they did."""
    ends = _ends(history, "rollouts/stop_agreement", "eval_stop_agreement")
    if ends is None or ends[1] > ends[0] - 0.2:
        return None
    return (
        f"Agreement on where to stop fell from {ends[0]:.2f} to {ends[1]:.2f}. Compare the stop sets of both sides, "
        "raise max_completion_length if most completions are cut, and use an objective that sees the stop event."
    )


@rule
def markup_surprise(history: History) -> str | None:
    """The teacher gives the end of the turn and the markup of a reply less than one chance in 400."""
    values = _values(history, "rollouts/teacher_markup_surprisal")
    if len(values) < WINDOW or median(values[-WINDOW:]) < 6:
        return None
    return (
        f"The teacher is surprised by markup: {median(values[-WINDOW:]):.1f} nats for the end of a turn. It reads a "
        "template that it was not trained on, a base model's text as a chat, or a think block that is open on one side "
        "only. Check teacher_tokenizer_name_or_path and teacher_chat_template_kwargs."
    )


@rule
def sampler_gap(history: History) -> str | None:
    """The engine's log-probs of its samples are a tenth of a nat from the student's: more than rounding."""
    values = _values(history, "sampling/logp_gap_mean")
    if not values or values[-1] < 0.1:
        return None
    if any(_values(history, "sampling/steps_old")):
        return (
            f"The student is {values[-1]:.2f} nats a token away from the one that wrote these completions ahead: its "
            "steps are large for texts of before them, or vLLM has other weights. Lower the learning rate, or set "
            "rollout_ahead to 0. Policy gradients are weighted for the gap up to vllm_importance_sampling_clip_max, "
            "divergences are not."
        )
    return (
        f"vLLM's log-probs of its own samples are {values[-1]:.2f} nats a token away from the student's, more "
        "than rounding should make. Look in its log for weights that were not loaded, start it with the trainer's "
        "dtype and without quantization or --logprobs-mode, and let no other run use it. Policy gradients are weighted "
        "for the gap up to vllm_importance_sampling_clip_max, divergences are not."
    )


@rule
def selection(history: History) -> str | None:
    """The student changes how it writes so that both sides cut it alike, and its text pays for that.

    For a history of steps (`diglot.watching.drift`), not of logs, which may come too rarely and be of too little text.

    Rows that exist only where the text happens to end a token on both sides teach "stop here": of "23" and "2" only the
    second has one, so numbers and words that the teacher reads whole become shorter (docs/objectives.md). The share of
    one-to-one rows rises by a quarter of the rest or more, and with them digits run shorter, text takes more or fewer
    tokens per byte, or fixed texts that nobody trains towards become less likely.
    """
    ends = _ends(history, "align/one_to_one")
    if ends is None or ends[1] < ends[0] + max(0.03, (1 - ends[0]) / 4):
        return None
    seen = []
    if (runs := _ends(history, "completions/digit_run")) and runs[1] < 0.85 * runs[0]:
        seen.append(f"numbers shrank from {runs[0]:.1f} to {runs[1]:.1f} digits")
    if (tokens := _ends(history, "completions/tokens_per_byte")) and abs(tokens[1] / tokens[0] - 1) > 0.1:
        seen.append(f"tokens per byte went from {tokens[0]:.2f} to {tokens[1]:.2f}")
    bits = _values(history, "watched/bits_per_byte")
    if len(bits) > 1 and bits[-1] > 1.05 * bits[0]:
        seen.append(f"fixed texts went from {bits[0]:.3f} to {bits[-1]:.3f} bits per byte")
    if not seen:
        return None
    return (
        f"The student is unlearning what both sides cut differently: one-to-one rows rose from {ends[0]:.0%} to "
        f"{ends[1]:.0%}, and {', and '.join(seen)}. The objective compares rows only where the text happens to end a "
        "token on both sides, which rewards text that ends there. Stop this run and start again from the student as it "
        "was, with objective: covering."
    )


RULES: tuple[Callable[[History], Advice | None], ...] = (
    coverage_falling,
    repetition,
    length_collapse,
    stop_disagreement,
    markup_surprise,
    sampler_gap,
)


def _values(history: History, *names: str) -> list[float]:
    """The values of the first of `names` that was logged at all."""
    for name in names:
        values = [entry[name] for entry in history if isinstance(entry.get(name), (int, float))]
        if values:
            return values
    return []


def _ends(history: History, *names: str) -> tuple[float, float] | None:
    """Median of the first and of the last logs that hold a metric; None before they are two separate groups."""
    values = _values(history, *names)
    if len(values) < 2 * WINDOW:
        return None
    return median(values[:WINDOW]), median(values[-WINDOW:])
