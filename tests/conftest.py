"""What all tests share: no network, few threads, nothing kept at home, and examples that are the same every time."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if "DIGLOT_TABLES" not in os.environ:  # nothing is written into the home of who runs the tests
    os.environ["DIGLOT_TABLES"] = tempfile.mkdtemp(prefix="diglot-tables-")
    atexit.register(shutil.rmtree, os.environ["DIGLOT_TABLES"], ignore_errors=True)

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
settings.register_profile("diglot", derandomize=True, deadline=None)
settings.load_profile("diglot")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a GPU run wherever there is one."""
    if torch.cuda.is_available():
        return
    absent = [item for item in items if item.get_closest_marker("cuda")]
    config.hook.pytest_deselected(items=absent)
    items[:] = [item for item in items if item not in absent]
