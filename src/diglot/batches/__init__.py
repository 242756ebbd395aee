"""What goes through both models in one pass: samples as each side reads them, padded, and aligned."""

from diglot.batches.batch import AlignedBatch, align_pairs, sampler_logps, text_sums
from diglot.batches.packed import PackedSide, pack, pad_id, padded
from diglot.batches.reading import PairReader, ReadPair, teacher_reads
from diglot.batches.written import Written, WrittenSide

__all__ = [
    "AlignedBatch",
    "PackedSide",
    "PairReader",
    "ReadPair",
    "Written",
    "WrittenSide",
    "align_pairs",
    "pack",
    "pad_id",
    "padded",
    "sampler_logps",
    "teacher_reads",
    "text_sums",
]
