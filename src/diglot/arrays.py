"""Names for the kinds of numpy arrays that go from module to module."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Ids = NDArray[np.int64]
"""Ints that are ids of tokens."""
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
