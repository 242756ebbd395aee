"""Numbers of a pair of tokenizers on texts: overlap, agreement, critical places, re-encoding."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from diglot.arrays import Bools, Ints
from diglot.batches import Written, WrittenSide
from diglot.inspection.facts import Agreement, Critical, Overlap, Reencoding
from diglot.objectives import Pair
from diglot.rendering import Renderer

CRITICAL = {
    "digits": re.compile(r"[0-9]+"),
    "operators": re.compile(r"[-+*/%=<>!&|^~]+"),
    "code whitespace": re.compile(r"\n[ \t]+|\t+|  +"),
    "identifiers": re.compile(r"[A-Za-z]\w*_\w+|\b[A-Z]?[a-z0-9]+[A-Z]\w*"),
    "CJK": re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]+"),
    "other scripts": re.compile(r"[\u0370-\u1fff\ua980-\uabff\ufb1d-\ufdff\ufe70-\ufeff]+"),
}

_LONGEST_CUT = 400  # characters of a text in which cuts are tried
_CUTS_PER_TEXT = 12
_CUTS_PER_CLASS = 60
_FURTHEST_CUT = 2000  # bytes of a text behind which it is not ended
_EXAMPLES = 20  # places that are looked at for a short example


def overlap(pair: Pair, written: Written) -> Overlap:
    """Tokens that both sides have: by number, and by how often the texts use them."""
    tables = pair.need_tables("inspection")
    shared_s, shared_t = pair.shared_s.numpy(), pair.shared_t.numpy()

    def mass(ids: Ints, stop: Bools, shared: Ints) -> float:
        return _share(np.isin(ids[~stop], shared))

    return Overlap(
        count=len(shared_s),
        of_student=len(shared_s) / max(int((~tables.student.control).sum()), 1),
        of_teacher=len(shared_t) / max(int((~tables.teacher.control).sum()), 1),
        mass_student=mass(written.student.ids, written.student.stop, shared_s),
        mass_teacher=mass(written.teacher.ids, written.teacher.stop, shared_t),
    )


def agreement(written: Written) -> Agreement:
    """How both sides cut the texts of a batch."""
    alignment, total = written.alignment, max(len(written.student.ids), 1)
    paired, covered = len(alignment.pair_s), int(written.usable_s.sum())
    num_bytes = sum(map(len, written.texts))
    tokens_s, tokens_t = (int((~side.stop).sum()) for side in (written.student, written.teacher))
    return Agreement(
        texts=len(written.texts),
        num_bytes=num_bytes,
        tokens_student=tokens_s,
        tokens_teacher=tokens_t,
        one_to_one=paired / total,
        in_chunks=(covered - paired) / total,
        unalignable=(total - covered) / total if len(written.student.ids) else 0.0,
        tokens_per_byte_student=tokens_s / max(num_bytes, 1),
        tokens_per_byte_teacher=tokens_t / max(num_bytes, 1),
        bytes_cut_unlike=_share(~_in_pairs(written)),
        inexact_texts_student=_inexact(written.student.segment, written.student.exact, len(written.texts)),
        inexact_texts_teacher=_inexact(written.teacher.segment, written.teacher.exact, len(written.texts)),
    )


def _inexact(segment: Ints, exact: Bools, num: int) -> float:
    return len(np.unique(segment[~exact])) / max(num, 1)


def critical(written: Written, student: Renderer, teacher: Renderer) -> tuple[Critical, ...]:
    """How tokens of digits, operators, indentation, identifiers and scripts other than Latin align.

    And a simulation of which rows an objective of one-to-one pairs would see: each text is ended in front of such a
    token, and read again. Where a row is compared if the text ends and is not if it goes on, what is compared was
    chosen by what was written.
    """
    return tuple(_critical(name, pattern, written, student, teacher) for name, pattern in CRITICAL.items())


def _critical(name: str, pattern: re.Pattern[str], written: Written, student: Renderer, teacher: Renderer) -> Critical:
    places = [
        (k, low, high) for k, text in enumerate(written.texts) for low, high in _byte_spans(pattern, text.decode())
    ]
    spans = np.array(places, dtype=np.int64).reshape(-1, 3)
    at_s, at_t = _touching(written.student, spans), _touching(written.teacher, spans)
    touched_s, touched_t = at_s >= 0, at_t >= 0
    paired = np.zeros(len(at_s), dtype=np.bool_)
    paired[written.alignment.pair_s] = True
    cuts = _places_of_cuts(written, touched_s)
    return Critical(
        name=name,
        places=len(spans),
        tokens_student=int(touched_s.sum()),
        tokens_teacher=int(touched_t.sum()),
        num_bytes=int((spans[:, 2] - spans[:, 1]).sum()),
        cut_unlike=_share(~_in_pairs(written)[_covered(written, spans[:, 0], spans[:, 1], spans[:, 2])]),
        one_to_one=_share(paired[touched_s]),
        aligned=_share(written.usable_s[touched_s]),
        cuts=len(cuts),
        goes_on=_share(paired[cuts]),
        ends=_share(_compared_at_the_end(written, cuts, student, teacher)),
        example=_example(written, at_s, at_t, len(spans)),
    )


def _places_of_cuts(written: Written, tokens: Bools) -> Ints:
    """Some of these student tokens, spread over all texts, in front of which a text can be ended, `[K]`."""
    side = written.student
    near = (side.start > 0) & (side.start <= _FURTHEST_CUT)
    places = [
        i for i in np.flatnonzero(tokens & near).tolist()
        if _ends_character(written.texts[side.segment[i]], int(side.start[i]))
    ]  # fmt: skip
    return np.array(places[:: max(1, -(-len(places) // _CUTS_PER_CLASS))], dtype=np.int64)


def _compared_at_the_end(written: Written, cuts: Ints, student: Renderer, teacher: Renderer) -> Bools:
    """For each cut: do both sides read the text up to it as it is, the student as the same tokens as before?"""
    side = written.student
    first = np.searchsorted(side.segment, side.segment[cuts])
    heads = [written.texts[side.segment[i]][: side.start[i]] for i in cuts.tolist()]
    texts = [head.decode() for head in heads]
    compared = []
    for i, low, head, mine, theirs in zip(
        cuts.tolist(), first.tolist(), heads, student.encoder.encode(texts), teacher.encoder.encode(texts), strict=True
    ):
        same = mine.ids.tolist() == side.ids[low:i].tolist()
        compared.append(same and bool(theirs.exact.all()) and int(theirs.ends[-1]) == len(head))
    return np.array(compared, dtype=np.bool_)


def _in_pairs(written: Written) -> Bools:
    """Which bytes of all texts, one after the other, lie in a token that is one on both sides."""
    side, pairs = written.student, written.alignment.pair_s
    return _covered(written, side.segment[pairs], side.start[pairs], side.end[pairs])


def _covered(written: Written, segment: Ints, low: Ints, high: Ints) -> Bools:
    """Which bytes of all texts lie in one of these spans, which do not overlap; what is beyond a text is left out."""
    sizes = np.array([len(text) for text in written.texts], dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(sizes)])
    edges = np.zeros(int(first[-1]) + 1, dtype=np.int64)
    np.add.at(edges, first[segment] + np.minimum(low, sizes[segment]), 1)
    np.add.at(edges, first[segment] + np.minimum(high, sizes[segment]), -1)
    return edges.cumsum()[:-1] > 0


def _byte_spans(pattern: re.Pattern[str], text: str) -> list[tuple[int, int]]:
    """(first byte, last byte + 1) of each match."""
    spans, at, seen = [], 0, 0
    for match in pattern.finditer(text):
        at += len(text[seen : match.start()].encode())
        end = at + len(match.group().encode())
        spans.append((at, end))
        at, seen = end, match.end()
    return spans


def _touching(side: WrittenSide, spans: Ints) -> Ints:
    """The span of `[P, 3]` (segment, low, high) that each token of a side shares a byte with, or -1, `[N]`."""
    end, start, segment = side.end, side.start, side.segment
    if not len(spans) or not len(end):
        return np.full(len(end), -1, dtype=np.int64)
    stride = max(int(end.max()), int(spans[:, 2].max())) + 1
    lows, highs = spans[:, 0] * stride + spans[:, 1], spans[:, 0] * stride + spans[:, 2]
    span = np.searchsorted(lows, segment * stride + end, side="left") - 1  # the last span that starts before the end
    inside = (span >= 0) & (highs[np.maximum(span, 0)] > segment * stride + start) & (end > start)
    return np.where(inside, span, -1)


def _example(written: Written, at_s: Ints, at_t: Ints, num: int) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Both cuts of the place with the fewest tokens among the first where they are unlike."""
    examples: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for place in range(num):
        mine, theirs = (
            _cut(written, side, at == place) for side, at in ((written.student, at_s), (written.teacher, at_t))
        )
        if mine != theirs and mine and theirs:
            examples.append((mine, theirs))
            if len(examples) == _EXAMPLES:
                break
    return min(examples, key=lambda cuts: len(cuts[0]) + len(cuts[1]), default=None)


def _cut(written: Written, side: WrittenSide, inside: Bools) -> tuple[str, ...]:
    """The text of each of these tokens; hex digits for bytes that are no text on their own."""
    rows = zip(side.segment[inside].tolist(), side.start[inside].tolist(), side.end[inside].tolist(), strict=True)
    return tuple(written.texts[k][low:high].decode("utf-8", "backslashreplace") for k, low, high in rows)


def reencoding(student: Renderer, teacher: Renderer, texts: Sequence[str]) -> Reencoding:
    """How often the beginning of a text, encoded alone, is not the beginning of its tokens."""
    cuts_s, changed_s = _changed(student, texts)
    cuts_t, changed_t = _changed(teacher, texts)
    return Reencoding(cuts_s + cuts_t, changed_s / max(cuts_s, 1), changed_t / max(cuts_t, 1))


def _changed(side: Renderer, texts: Sequence[str]) -> tuple[int, int]:
    """Number of cuts, and of those that change ids. Cuts are where a token ends that ends a character too."""
    starts: list[str] = []
    before: list[list[int]] = []
    heads = [text[:_LONGEST_CUT] for text in texts]
    for text, encoded in zip(heads, side.encoder.encode(heads), strict=True):
        raw = text.encode()
        good = [i for i, end in enumerate(encoded.ends[:-1]) if encoded.exact[i] and _ends_character(raw, int(end))]
        for i in good[:: max(1, -(-len(good) // _CUTS_PER_TEXT))]:
            starts.append(raw[: int(encoded.ends[i])].decode())
            before.append(encoded.ids[: i + 1].tolist())
    again = side.encoder.encode(starts)
    return len(starts), sum(a.ids.tolist() != b for a, b in zip(again, before, strict=True))


def _ends_character(raw: bytes, at: int) -> bool:
    return 0 < at < len(raw) and (raw[at] & 0xC0) != 0x80


def _share(flags: Bools) -> float:
    return float(flags.mean()) if len(flags) else 0.0
