"""One text through both sides of a pair of tokenizers, checked against the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diglot.batches import PairReader, ReadPair, align_pairs
from diglot.data import Sample
from diglot.rendering import Conversation, Renderer


def check_pair(student: Renderer, teacher: Renderer, texts: Sequence[str]) -> tuple[int, int]:
    """Align the texts as replies; every exact chunk must spell the same bytes on both sides. Counts (covered, tokens).

    The check reads the table of bytes and the ids alone: it does not trust the offsets that it checks.
    """
    reader = PairReader(student, teacher, same_vocabulary=False)
    pairs = [reader.written(Sample(Conversation(None, "Say:"), text, "test")) for text in texts]
    return _check(student, teacher, pairs, [text.encode() for text in texts])


def check_sampled(student: Renderer, teacher: Renderer, completions: Sequence[NDArray]) -> tuple[int, int]:
    """The same of ids that a student sampled. Their text must be the longest valid beginning of what they spell."""
    reader = PairReader(student, teacher, same_vocabulary=False)
    pairs = [reader.sampled(Conversation(None, "Say:"), ids) for ids in completions]
    wholes = []
    for pair, ids in zip(pairs, completions, strict=True):
        assert pair is not None
        table, text = student.vocabulary, pair.student.segment_bytes[-1]
        stops = np.flatnonzero(np.isin(ids, student.stop_ids))
        spelt = []
        for token in ids[: stops[0]] if len(stops) else ids:
            if table.control[token]:
                break
            spelt.append(table.token(token))
        ends = [0, *np.cumsum([len(part) for part in spelt]).tolist()]
        assert len(text) == max(end for end in ends if _is_utf8(b"".join(spelt)[:end])), ids
        assert b"".join(spelt).startswith(text), ids
        wholes.append(text)
    return _check(student, teacher, pairs, wholes)


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
            found = wholes[segment].find(mine, int(position[segment]))
            assert found >= 0, (wholes[segment], mine)
            position[segment] = found + len(mine)
    return int(batch.stats["covered"]), int(batch.stats["tokens"])
