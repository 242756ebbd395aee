"""Which tokens of two tokenizations cover the same bytes? Offsets in, index arrays out; numpy only."""

from __future__ import annotations

from diglot.alignment.align import align, check_bytes, starts
from diglot.alignment.types import Alignment, Side

__all__ = ["Alignment", "Side", "align", "check_bytes", "starts"]
