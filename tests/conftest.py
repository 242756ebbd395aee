"""What all tests share: no network, few threads, and generated examples that are the same every time."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import settings

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
settings.register_profile("diglot", derandomize=True, deadline=None)
settings.load_profile("diglot")
