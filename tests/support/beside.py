"""Load a test module that stands beside another, without a folder of tests on the path of imports."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def load_beside(file: str, name: str) -> ModuleType:
    """The module `name` in the folder of `file`."""
    spec = importlib.util.spec_from_file_location(name, Path(file).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
