"""Which objective makes the better student? One table in which the known ones meet on equal terms.

    python -m benchmarks.quality run ci          # or exact, cpu, gpu, or a file of your own
    python -m benchmarks.quality table ci        # from the results that are there, without running anything

A declaration (`ci.yaml`, read by `declaration`) names pairs, arms, budgets and seeds. `runner` makes one JSON file per
cell, so what was killed goes on where it was; `table` and `plots` read them, with the statistics of `paired`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_BENCHMARKS = Path(__file__).resolve().parents[1]
for _folder in (_BENCHMARKS, _BENCHMARKS.parent / "demo"):  # the other benchmarks, and where real models come from
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))
