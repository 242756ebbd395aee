"""What is asked of a server before anything is trained: does it read our ids, and are its numbers the model's own
distribution?

What can be shown from outside is shown, and refused with the two values seen. What cannot: a server that was started
with a fixed temperature gives a proper distribution, only another one; and log-probs of the right tokens of another
model with the same tokenizer are log-probs. Nothing but a reference would tell.
"""

from __future__ import annotations

import logging

import numpy as np

from diglot.arrays import Floats
from diglot.errors import TeacherError
from diglot.http.client import Client, Refused
from diglot.rendering import Renderer
from diglot.teachers.wire import Asking, Ids, TokenScores, Wire

logger = logging.getLogger(__name__)

TEXT = "The capital of France is Paris.\n\n    def naïve(x1): return 数学 + '👩‍🚀'  # 12345"
_TOP = 8
_MOVED = 0.1  # total variation between two readings of one row: rounding of bfloat16 stays well below
_NOISE = 0.25  # nats, mean over the probe, likewise
_OVER = 0.02  # a distribution's mass may exceed 1 by this much: rounding
_NONSENSE, _SHORTEST = 8, 8


def check_server(client: Client, wire: Wire, renderer: Renderer) -> None:
    """Raise `TeacherError` unless the server reads our ids and gives raw log-probs at their own positions."""
    check_tokenizer(client, wire, renderer)
    ids, window = probe_ids(renderer)[: wire.info.longest], wire.info.longest
    if len(ids) < _SHORTEST:
        raise TeacherError(
            f"{client.url} takes {window} tokens, too few for a text of {_SHORTEST}. Start it with a longer window."
        )
    scores = _scored(client, wire, ids, Asking(top=_TOP))
    _check_distribution(client.url, scores, ids)
    _check_positions(client, wire, ids, scores)
    _check_raw(client, wire, ids)
    _check_size(client, wire, renderer)


def probe_ids(renderer: Renderer) -> list[int]:
    """Text, and then ids that nobody would write: a raw distribution gives even these some mass."""
    vocabulary = renderer.vocabulary
    text = renderer.encoder.encode([TEXT])[0].ids
    plain = np.flatnonzero((vocabulary.lengths > 0) & ~vocabulary.control)
    nonsense = np.random.default_rng(0).choice(plain, size=min(_NONSENSE, len(plain)), replace=False)
    return [int(i) for i in [*text[:40], *nonsense]]


def check_tokenizer(client: Client, wire: Wire, renderer: Renderer) -> None:
    """The server's ids of a text against ours."""
    stop = renderer.tokenizer.convert_ids_to_tokens(renderer.stop_id)
    text = TEXT + (stop if isinstance(stop, str) else "")
    ours = [int(i) for i in renderer.tokenizer(text, add_special_tokens=False)["input_ids"]]
    theirs = wire.tokenize(client, text)
    if theirs is None:
        logger.warning(
            "%s has no /tokenize: that its tokenizer is %s was not checked by a text, only by its size.",
            client.url,
            renderer.tokenizer.name_or_path,
        )
        return
    if theirs == ours:
        return
    at = next((k for k, both in enumerate(zip(ours, theirs, strict=False)) if both[0] != both[1]), None)
    at = min(len(ours), len(theirs)) if at is None else at
    raise TeacherError(
        f"The server's tokenizer is not the teacher's ({renderer.tokenizer.name_or_path!r}): a text that is "
        f"{len(ours)} tokens here is {len(theirs)} there, and token {at} is id {_at(ours, at)} here, {_at(theirs, at)} "
        f"at {client.url}. Name the tokenizer of the model that is served in teacher_tokenizer_name_or_path."
    )


def _at(ids: list[int], k: int) -> int | None:
    return ids[k] if k < len(ids) else None


def _scored(client: Client, wire: Wire, ids: Ids, asking: Asking) -> TokenScores:
    try:
        return wire.score(client, ids, asking)
    except Refused as error:
        raise TeacherError(
            f"The server does not take what a teacher is asked ({len(ids)} ids, their log-probs and the likeliest "
            f"{asking.top}). {error} It must take token ids and give at least {_TOP} log-probs of each token of a "
            "given text; vLLM does (--max-logprobs 20 is its default)."
        ) from None


def _check_distribution(url: str, scores: TokenScores, ids: Ids) -> None:
    others = (scores.top_ids[1:] >= 0).sum(-1).min()
    if others < 2:
        raise TeacherError(
            f"{url} gives the log-prob of the written token alone, not of the likeliest {_TOP} that were asked for. "
            "Whether it stands at its own position cannot be known from that. Start the server so that it gives some."
        )
    written = np.asarray(ids)[:, None] == scores.top_ids
    mass = np.exp(scores.top_logps).sum(-1) + np.where(written.any(-1), 0.0, np.exp(scores.logps))
    worst = float(mass[1:].max())
    if worst > 1 + _OVER:
        raise TeacherError(
            f"The probabilities that {url} gives of one token add up to {worst:.3f}, more than 1: they are not those "
            "of one distribution. With vLLM, start it with --logprobs-mode raw_logprobs."
        )


def _check_positions(client: Client, wire: Wire, ids: list[int], scores: TokenScores) -> None:
    """Entry t must not depend on token t, and must depend on the one before it."""
    moved_own, moved_before = 0.0, 0.0
    for other in dict.fromkeys(ids[1:4]):
        for place in (-1, -2):
            changed = list(ids)
            if changed[place] == other:
                continue
            changed[place] = other
            distance = _distance(scores, _scored(client, wire, changed, Asking(top=_TOP)))
            if place == -1:
                moved_own = max(moved_own, distance)
            else:
                moved_before = max(moved_before, distance)
    if moved_own > _MOVED:
        raise TeacherError(
            f"{client.url} gives log-probs one position late: with another last token the distribution that should "
            f"have predicted it moved by {moved_own:.2f} (total variation), expected 0. What it echoes for a token is "
            "what comes after it, as llama-cpp-python's server does. Serve the model with vLLM or SGLang."
        )
    if moved_before < 1e-6:
        raise TeacherError(
            f"The distribution that {client.url} gives of the last token does not depend on the token before it (it "
            f"moved by {moved_before:.1e}): its log-probs stand too early, or are not of the text that was sent. Serve "
            "the model with vLLM or SGLang."
        )


def _distance(a: TokenScores, b: TokenScores) -> float:
    """Total variation between the last rows of two readings, on the ids that one of them gives; a lower bound."""
    one, two = (dict(zip(x.top_ids[-1].tolist(), np.exp(x.top_logps[-1]).tolist(), strict=True)) for x in (a, b))
    # An id that one reading leaves out has at most the least mass that it gives.
    floors = min(one.values()), min(two.values())
    gaps = [max(one[i] - two.get(i, min(floors[1], one[i])), 0.0) for i in one]
    back = [max(two[i] - one.get(i, min(floors[0], two[i])), 0.0) for i in two]
    distance: float = max(sum(gaps), sum(back))
    return distance


def _check_raw(client: Client, wire: Wire, ids: list[int]) -> None:
    """The request's temperature and top-p are about what is generated; log-probs of a given text must not follow."""
    first, second = (_scored(client, wire, ids, Asking(top=_TOP, temperature=t)) for t in (0.5, 2.0))
    shift = _mean_gap(first.logps, second.logps)
    if shift > _NOISE:
        raise TeacherError(
            f"{client.url} gives tempered log-probs: one text at temperature 0.5 and 2 differs by {shift:.2f} nats a "
            "token, expected 0. Teachers are asked for the model's own distribution: start the server so that it gives "
            "raw log-probs (vLLM: --logprobs-mode raw_logprobs)."
        )
    whole, cut = (_scored(client, wire, ids, Asking(top=_TOP, top_p=p)) for p in (1.0, 0.3))
    shift = _mean_gap(whole.logps, cut.logps)
    if shift > _NOISE:
        raise TeacherError(
            f"{client.url} renormalises log-probs after top-p: the same text at top_p 1 and 0.3 differs by {shift:.2f} "
            "nats a token, expected 0. Start the server so that it gives raw log-probs (vLLM: --logprobs-mode "
            "raw_logprobs)."
        )


def _mean_gap(a: Floats, b: Floats) -> float:
    return float(np.abs(a[1:] - b[1:]).mean())


def _check_size(client: Client, wire: Wire, renderer: Renderer) -> None:
    """The server must take the largest id that we might send."""
    vocabulary = renderer.vocabulary
    largest = int(max(np.flatnonzero(vocabulary.lengths > 0).max(), *renderer.stop_ids))
    try:
        wire.score(client, [largest, largest], Asking(top=1))
    except Refused as error:
        raise TeacherError(
            f"The server does not take id {largest}, the largest of the teacher's tokenizer "
            f"({renderer.tokenizer.name_or_path!r}, {len(vocabulary)} ids): it says {error.answer[:200]!r}. Name the "
            "tokenizer of the model that is served in teacher_tokenizer_name_or_path."
        ) from None
