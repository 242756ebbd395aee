"""What goes into an alignment and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from diglot.arrays import Bools, Ints

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array")
"""`NDArray` as `align` returns it, `torch.Tensor` after `Alignment.to`."""


@dataclass(frozen=True)
class Side:
    """The scored tokens of one side, packed over a batch, in order of segment and position.

    A token starts where the one before it in its segment ended, the first one at byte 0.
    """

    end: Ints  # [N] byte end inside the segment; length + 1 for the stop token
    segment: Ints  # [N] in [0, num_segments), ascending
    exact: Bools  # [N] are the token's bytes the bytes of the text?
    stop: Bools  # [N] is it the stop event? Only the last token of a segment can be


@dataclass(frozen=True)
class Alignment(Generic[Array]):
    """The chunks of a batch: the finest cut of each segment at the byte offsets where tokens of *both* sides end.

    Chunks are numbered through the batch in reading order. Each holds at least one token of either side.
    """

    num_segments: int
    chunk_s: Array  # int64 [N_s] chunk of each student token, -1 after the last shared boundary of its segment
    chunk_t: Array  # int64 [N_t] the same for the teacher
    chunk_segment: Array  # int64 [C]
    count_s: Array  # int64 [C] student tokens of the chunk, >= 1
    count_t: Array  # int64 [C] teacher tokens of the chunk, >= 1
    chunk_exact: Array  # bool [C] are all its tokens, on both sides, exact?
    chunk_stop: Array  # bool [C] does it hold the stop event?
    pair_s: Array  # int64 [P] student token of each exact chunk of one token on either side, ascending
    pair_t: Array  # int64 [P] its teacher token
    teacher_at: Array  # int64 [N_s] last teacher token of the segment that starts at or before the student's, or -1
    coverage: float  # share in [0, 1] of the student's tokens that lie in an exact chunk; 1 when there are no tokens
    one_to_one: float  # share in [0, 1] of the student's tokens that are paired; 1 when there are no tokens
    dropped: int  # tokens of both sides that lie in no chunk

    @property
    def num_chunks(self) -> int:
        """`C`."""
        return len(self.chunk_segment)  # type: ignore[arg-type]

    def in_exact_chunk(self, chunk: Any) -> Any:
        """Which tokens lie in an exact chunk, bool [N], given the chunk of each, `chunk_s` or `chunk_t`."""
        inside = chunk >= 0
        return inside & self.chunk_exact[chunk * inside] if self.num_chunks else inside  # type: ignore[index]

    def to(self, device: torch.device | str) -> Alignment[torch.Tensor]:
        """The same with torch tensors on `device` in place of the arrays."""
        import torch

        def moved(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                value = torch.from_numpy(value)
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})  # type: ignore[return-value]
