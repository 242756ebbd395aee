"""One text through both sides of a pair of tokenizers, checked against the bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diglot.batches import PairReader, align_pairs
from diglot.data import Sample
from diglot.rendering import Conversation, Renderer


def check_pair(student: Renderer, teacher: Renderer, texts: Sequence[str]) -> tuple[int, int]:
    """Align the texts as replies; every exact chunk must spell the same bytes on both sides. Counts (covered, tokens).

    The check reads the table of bytes and the ids alone: it does not trust the offsets that it checks.
    """
    reader = PairReader(student, teacher, same_vocabulary=False)
    pairs = [reader.written(Sample(Conversation(None, "Say:"), text, "test")) for text in texts]
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
    wholes = [text.encode() for text in texts]
    position = np.zeros(len(texts), dtype=np.int64)
    described = zip(alignment.chunk_segment, alignment.chunk_exact & ~alignment.chunk_stop, strict=True)
    for c, (segment, exact) in enumerate(described):
        if exact:
            mine, theirs = spelt[0][c], spelt[1][c]
            if optional and not position[segment]:
                mine, theirs = mine.removeprefix(b" "), theirs.removeprefix(b" ")
            assert mine == theirs, (texts[segment], mine, theirs)
            found = wholes[segment].find(mine, int(position[segment]))
            assert found >= 0, (texts[segment], mine)
            position[segment] = found + len(mine)
    return int(batch.stats["covered"]), int(batch.stats["tokens"])
