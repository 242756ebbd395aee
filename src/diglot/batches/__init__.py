"""What goes through both models in one pass: samples as each side reads them, padded, and aligned."""

from diglot.batches.batch import AlignedBatch, align_pairs
from diglot.batches.packed import PackedSide, pack
from diglot.batches.reading import PairReader, ReadPair

__all__ = ["AlignedBatch", "PackedSide", "PairReader", "ReadPair", "align_pairs", "pack"]
