"""Which conversations do we train on?"""

from diglot.data.loading import load_dataset
from diglot.data.samples import Sample, collate_samples, to_sample
from diglot.data.sources import hold_out, load_sources
from diglot.data.survey import usable_rows

__all__ = [
    "Sample",
    "collate_samples",
    "hold_out",
    "load_dataset",
    "load_sources",
    "to_sample",
    "usable_rows",
]
