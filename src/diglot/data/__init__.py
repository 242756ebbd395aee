"""Which conversations do we train on?"""

from diglot.data.samples import Sample, to_sample

__all__ = ["Sample", "to_sample"]
