"""Golden trajectories of the demo pair: tiny random stand-ins behind the real tokenizers, five steps of each trainer.

    python tests/golden/record.py      # after a change that is meant to change them; refuses a tree that is not clean

A trajectory is what a run logs: loss, gradient norm, alignment. The tokenizers are `make test-real`'s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KINDS = ("gkd", "minillm")
LOGGED = (
    "loss",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "align/",
    "completions/",
    "on_policy",
    "minillm/log_ratio",
)


def path(kind: str) -> Path:
    """Where the trajectory of a trainer is kept."""
    return HERE / f"{kind}.json"


def trajectory(kind: str, out: Path) -> list[dict[str, float]]:
    """Five steps, each with what it logged."""
    from support import tiny
    from support.real_assets import tokenizer

    student, teacher = tokenizer("smollm2"), tokenizer("gemma3")
    build = {"gkd": tiny.gkd, "minillm": tiny.minillm}[kind]
    own: dict[str, Any] = {
        "gkd": {"lmbda": 0.5, "objective": "strict", "beta": 0.5},
        "minillm": {"num_iterations": 2, "teacher_mixed_alpha": 0.2},
    }[kind]
    small = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    models = tiny.tiny_model(student, 0, **small), tiny.tiny_model(teacher, 1, **small)
    options = dict(
        max_steps=5, gradient_accumulation_steps=2, per_device_train_batch_size=2, lr_scheduler_type="linear"
    )
    trainer = build(out, student, teacher, models=models, **own, **options)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{k: float(v) for k, v in entry.items() if k.startswith(LOGGED)} for entry in logs]


def changed_files(root: Path = ROOT) -> list[str]:
    """What differs from the last commit, the trajectories themselves left out."""
    done = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    own = {f"tests/golden/{kind}.json" for kind in KINDS}
    return [line for line in done.stdout.splitlines() if line[3:] not in own]


def record(root: Path = ROOT) -> int:
    """Write the trajectories; 1 if the tree is not clean."""
    if changed := changed_files(root):
        print("The tree is not clean, so nobody could tell what was recorded. Commit first:", file=sys.stderr)
        print("\n".join(changed), file=sys.stderr)
        return 1
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    from diglot.checkpoints.manifest import versions

    for kind in KINDS:
        with tempfile.TemporaryDirectory() as out:
            entry = {"commit": commit.stdout.strip(), "versions": versions(), "steps": trajectory(kind, Path(out))}
        path(kind).write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
        print(path(kind))
    return 0


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(ROOT / folder) for folder in ("src", "tests", "demo")]
    sys.exit(record())
