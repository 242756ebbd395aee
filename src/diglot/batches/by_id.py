"""Equal vocabularies: every token that was written is compared, text or not, since the teacher reads the same ids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from diglot.rendering import Rendered, Renderer, Role


def scored_by_id(side: Renderer, read: Rendered, written: Rendered, stopped: bool) -> Rendered:
    """What `side` reads, which ends with the ids of `written`'s reply, with all of them as tokens of one segment.

    A control token is spelt by its name there, and bytes that are no character stay what they are: the bytes only say
    that both sides hold the same tokens at the same places. `stopped`: is the last id one that ends the writer's turn?
    """
    count = len(written.ids) - written.prompt_length
    first = len(read.ids) - count
    spelt = [_spelt(side, int(i)) for i in written.ids[-count:]]
    ends = np.cumsum([len(one) for one in spelt])
    arrays = {name: getattr(read, name).copy() for name in ("ids", "roles", "segment", "end", "exact")}
    arrays["segment"][first:], arrays["exact"][first:], arrays["end"][first:] = 0, True, ends
    if stopped:
        spelt.pop()
        arrays["roles"][-1] = Role.STOP
        if int(arrays["ids"][-1]) not in side.stop_ids:
            arrays["ids"][-1] = side.stop_id
        arrays["end"][-1] = sum(map(len, spelt)) + 1
    return replace(read, **arrays, segment_bytes=(b"".join(spelt),), stopped=(stopped,), own_markup=0)


def unscored(written: Rendered) -> bool:
    """Did the writer write tokens that no segment holds: control tokens, or what stands behind a broken character?"""
    return bool((written.segment[written.prompt_length :] < 0).any())


def _spelt(side: Renderer, token: int) -> bytes:
    return side.vocabulary.token(token) or side.vocabulary.display(token).encode()
