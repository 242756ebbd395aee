"""The teacher's server and that of the rollouts for a run of several nodes, until standard input closes.

python node_servers.py HOST FOLDER: prints the two addresses. FOLDER holds `student` and `teacher`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from support.rollout_server import RolloutServer
from support.teacher_server import TeacherServer
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(host: str, folder: Path) -> None:
    """Serve both."""
    torch.set_num_threads(1)
    models, tokenizers = (
        [made.from_pretrained(folder / name) for name in ("teacher", "student")]
        for made in (AutoModelForCausalLM, AutoTokenizer)
    )
    teacher, rollouts = TeacherServer(models[0].eval(), tokenizers[0]), RolloutServer(models[1].eval(), tokenizers[1])
    teacher.host = rollouts.host = host
    print(teacher.start().url, rollouts.start().url, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
