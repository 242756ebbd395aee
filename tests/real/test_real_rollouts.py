"""A real vLLM on the CPU writes a real student's completions: it takes new weights, and says the student's log-probs.

`make test-server` installs it (demo/vllm_server.py) and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
import vllm_server
from support import tiny
from support.real_assets import model_folder, tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from diglot.errors import RolloutError
from diglot.trainers import GKDTrainer

pytestmark = [pytest.mark.real, pytest.mark.server]
NAME = "smollm2-135m-instruct"
ROOT = Path(__file__).resolve().parents[2]


def installed() -> None:
    if not (vllm_server.environment() / "complete").exists():
        pytest.fail("vLLM is not installed. Run `make test-server`, which installs it.")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    installed()
    place = tmp_path_factory.mktemp("vllm")
    copy = vllm_server.untie(model_folder(NAME), place / "student")
    with vllm_server.running(copy, place / "server.log", VLLM_SERVER_DEV_MODE="1") as result:
        yield result


def student() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_folder(NAME), dtype=torch.float32)


def run(out: Path, url: str, make: Any = tiny.gkd, **options: Any) -> Any:
    """Two steps that move the student far: a learning rate at which old weights could not be overlooked."""
    own = dict(use_vllm=True, vllm_server_base_url=url, optim="sgd", learning_rate=0.3, max_grad_norm=1.0)
    sizes = dict(max_completion_length=16, max_steps=3, per_device_train_batch_size=4)
    models = (student(), tiny.tiny_model(zoo.chatml(), 1))
    trainer = make(
        out, tokenizer("smollm2"), zoo.chatml(), tiny.PROMPT_ROWS, models=models, **{**own, **sizes, **options}
    )
    trainer.train()
    return trainer


def gaps(trainer: GKDTrainer) -> list[float]:
    return [e["sampling/logp_gap_max"] for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize(("make", "options"), [
    (tiny.gkd, dict(lmbda=1.0, objective="span")), (tiny.minillm, dict(num_iterations=1)),
], ids=["gkd", "minillm"])  # fmt: skip
def test_vllm_has_the_weights_of_each_step(url: str, tmp_path: Path, make: Any, options: dict[str, Any]) -> None:
    """In float32 its log-probs of its samples are the student's to 1e-3 nats at every step, while the student moves."""
    start = tiny.parameters(student())
    trainer = run(tmp_path, url, make, **options)
    result = gaps(trainer)
    assert len(result) == 3 and max(result) < 1e-3
    moved = sum(float((start[n] - p.detach()).square().sum()) for n, p in trainer.model.named_parameters()) ** 0.5
    assert moved > 0.1


def test_a_vllm_that_keeps_its_weights_is_seen(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run without the reload: the gap grows with the student's way, or the run is stopped."""
    from diglot.rollouts.vllm_server import VLLMServer

    run(tmp_path / "right", url, lmbda=1.0, objective="span", max_steps=1)
    monkeypatch.setattr(VLLMServer, "sync", lambda self, model: None)
    try:
        result = gaps(run(tmp_path / "stale", url, lmbda=1.0, objective="span"))
    except RolloutError as error:
        assert "does not have the student's weights" in str(error)
    else:
        assert result[-1] > 0.05


def test_completions_are_the_same_for_the_same_seeds(url: str, tmp_path: Path) -> None:
    one, two = (run(tmp_path / name, url, lmbda=1.0, objective="span", max_steps=2) for name in ("a", "b"))
    logged = [[e["span/loss"] for e in t.state.log_history if "loss" in e] for t in (one, two)]
    assert logged[0] == pytest.approx(logged[1], abs=1e-3)


def test_a_copy_with_a_tied_head_is_refused_on_a_cpu(tmp_path: Path) -> None:
    installed()
    with (
        vllm_server.running(model_folder(NAME), tmp_path / "server.log", VLLM_SERVER_DEV_MODE="1") as url,
        pytest.raises(RolloutError, match="output head is its embedding"),
    ):
        run(tmp_path / "run", url, lmbda=1.0, objective="span")


def test_vllm_in_one_process_with_the_student_has_its_weights(tmp_path: Path) -> None:
    """In vLLM's environment, as record.py does it: made from one student, reloaded with another."""
    installed()
    code = (
        "import sys, json, runpy; sys.path.append(sys.argv[1]); from pathlib import Path\n"
        "record = runpy.run_path('tests/rollouts/record.py')\n"
        "from real_assets import model_folder\n"
        f"found = record['record_colocate'](model_folder({NAME!r}))\n"
        "Path(sys.argv[2]).write_text(json.dumps(found))\n"
    )
    out = tmp_path / "found.json"
    around = {**vllm_server.surroundings(), "PYTHONPATH": os.pathsep.join(("src", "tests", "demo"))}
    python = str(vllm_server.environment() / "bin" / "python")
    words = [python, "-c", code, sysconfig.get_path("purelib"), str(out)]
    done = subprocess.run(words, cwd=ROOT, env=around, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(out.read_text())
    logprobs = [[row[str(i)] for i, row in zip(c["token_ids"], c["logprobs"], strict=True)] for c in printed["calls"]]
    own = [logps for written in printed["transformers_logps"] for logps in written]
    assert len(logprobs) == len(own) == 6
    for a, b in zip(logprobs, own, strict=True):
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-3
