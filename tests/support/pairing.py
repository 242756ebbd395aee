"""One text through both sides of a pair of tokenizers, checked against the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diglot.batches import PairReader, ReadPair, align_pairs
from diglot.data import Sample
from diglot.rendering import Conversation, Renderer, Role


def check_pair(student: Renderer, teacher: Renderer, texts: Sequence[str]) -> tuple[int, int]:
    """Align the texts as replies; every exact chunk must spell the same bytes on both sides. Counts (covered, tokens).

    The check reads the table of bytes and the ids alone: it does not trust the offsets that it checks.
    """
    reader = PairReader(student, teacher, same_vocabulary=False)
    pairs = [reader.written(Sample(Conversation(None, "Say:"), text, "test")) for text in texts]
    return _check(student, teacher, pairs, [text.encode() for text in texts])


def check_sampled(student: Renderer, teacher: Renderer, completions: Sequence[NDArray]) -> tuple[int, int]:
    """The same of ids that a student sampled: every run of text between control tokens is a segment, on both sides.

    The last run may be cut: at the end of the last token before its first byte that is no text. Tokens in no segment
    are counted, as an edge or as markup.
    """
    reader = PairReader(student, teacher, same_vocabulary=False)
    pairs = [reader.sampled(Conversation(None, "Say:"), ids) for ids in completions]
    wholes = []
    for pair, ids in zip(pairs, completions, strict=True):
        assert pair is not None
        segments = pair.student.segment_bytes
        assert segments == _runs(student, ids), ids
        assert pair.teacher.segment_bytes == segments, ids
        _check_tokens(student, pair, ids)
        wholes += segments
    return _check(student, teacher, pairs, wholes)


def _before_stop(student: Renderer, ids: NDArray) -> NDArray:
    stops = np.flatnonzero(np.isin(ids, student.stop_ids))
    return ids[: stops[0]] if len(stops) else ids


def _runs(student: Renderer, ids: NDArray) -> tuple[bytes, ...]:
    """The text of `ids` between its control tokens. Empty runs are no segments, but for the last, which may stop."""
    table, runs = student.vocabulary, [b""]
    rest = [b"", *(b"" if table.control[token] else table.token(token) for token in ids)]
    written = _before_stop(student, ids)
    at = 0
    while at < len(written):
        if table.control[written[at]]:
            runs.append(b"")
            at += 1
            continue
        end = next((i for i in range(at, len(written)) if table.control[written[i]]), len(written))
        spelt = [b"".join(rest[at + 1 : k + 1]) for k in range(at, end + 1)]
        runs[-1] = max((text for text in spelt if _is_utf8(text)), key=len)
        if runs[-1] != spelt[-1]:
            break
        at = end
    return tuple(run for k, run in enumerate(runs) if run or k == len(runs) - 1)


def _check_tokens(student: Renderer, pair: ReadPair, ids: NDArray) -> None:
    """Exact tokens spell their bytes of their segment, and no token is left out without being counted."""
    side, written = pair.student, _before_stop(student, ids)
    tail = slice(len(side.ids) - min(len(written) + 1, len(ids)), None)
    read = zip(*(a[tail].tolist() for a in (side.ids, side.segment, side.end, side.exact, side.roles)), strict=True)
    unscored = 0
    for token, segment, end, exact, role in read:
        unscored += segment < 0
        if segment >= 0 and exact and role != Role.STOP:
            spelt = student.vocabulary.token(token)
            assert side.segment_bytes[segment][:end].endswith(spelt), ids
    assert side.reply is not None
    assert unscored == sum(len(slot.edges) for slot in side.reply.slots) + side.own_markup, ids


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _check(
    student: Renderer, teacher: Renderer, pairs: Sequence[ReadPair | None], wholes: Sequence[bytes]
) -> tuple[int, int]:
    batch = align_pairs(pairs, pad_s=student.stop_id, pad_t=teacher.stop_id, on_policy=False)
    alignment = batch.alignment
    sides = ((batch.student, alignment.chunk_s, student), (batch.teacher, alignment.chunk_t, teacher))
    spelt = []
    for side, chunk, renderer in sides:
        parts: list[bytes] = [b""] * alignment.num_chunks
        for token, c, stop in zip(side.targets.tolist(), chunk.tolist(), side.stop.tolist(), strict=True):
            if c >= 0 and not stop:
                parts[c] += renderer.vocabulary.token(token)
        spelt.append(parts)
    # The space that WordPiece puts before a word may be there or not before the first one.
    optional = student.vocabulary.leading_space or teacher.vocabulary.leading_space
    position = np.zeros(len(wholes), dtype=np.int64)
    described = zip(alignment.chunk_segment, alignment.chunk_exact & ~alignment.chunk_stop, strict=True)
    for c, (segment, exact) in enumerate(described):
        if exact:
            mine, theirs = spelt[0][c], spelt[1][c]
            if optional and not position[segment]:
                mine, theirs = mine.removeprefix(b" "), theirs.removeprefix(b" ")
            assert mine == theirs, (wholes[segment], mine, theirs)
            result = wholes[segment].find(mine, int(position[segment]))
            assert result >= 0, (wholes[segment], mine)
            position[segment] = result + len(mine)
    return int(batch.stats["covered"]), int(batch.stats["tokens"])
