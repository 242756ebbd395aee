"""Which conversations do we train on?"""

from diglot.data.loading import has_replies, load_dataset
from diglot.data.samples import Sample, to_sample

__all__ = ["Sample", "has_replies", "load_dataset", "to_sample"]
