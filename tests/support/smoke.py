"""Does an installed Diglot work? The commands of a first hour, on tiny models, from outside the repository.

`make smoke` builds the wheel, installs it alone into an empty environment and runs this there as
`python -I tests/support/smoke.py`. Needs nothing but the wheel and what it depends on: no test package, no network.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
COMMAND = Path(sysconfig.get_path("scripts")) / "diglot"
TEXT = "x = 12345, naïve 数学"
STEP = ["--max_steps", "1", "--logging_steps", "1", "--per_device_train_batch_size", "2", "--use_cpu"]
SHORT = ["--max_completion_length", "8"]


def diglot(*words: str, code: int = 0) -> str:
    """Run one command and return both of its streams; any other exit code than `code` ends this program."""
    done = subprocess.run([str(COMMAND), *words], capture_output=True, text=True, timeout=600)
    if done.returncode != code:
        sys.exit(f"diglot {' '.join(words)}: exit code {done.returncode}, expected {code}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def check(holds: bool, what: str) -> None:
    """End this program unless `holds`."""
    if not holds:
        sys.exit(f"failed: {what}")
    print(f"ok: {what}", flush=True)


def make_models(folder: Path) -> Iterator[str]:
    """Two random models of different tokenizers as ordinary folders."""
    sys.path.insert(0, str(TESTS))
    from support import tiny, tokenizers_zoo

    for name, tokenizer in (("student", tokenizers_zoo.chatml()), ("teacher", tokenizers_zoo.inst())):
        tiny.tiny_model(tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        yield str(folder / name)


def logs(run: Path) -> list[dict[str, object]]:
    """What a run wrote into its metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def smoke(folder: Path) -> None:
    """Every step, in the order in which somebody new takes them."""
    import diglot as package

    check(
        TESTS.parent / "src" not in Path(package.__file__).parents, f"the installed package is used, {package.__file__}"
    )
    version = metadata.version("diglot")
    check(diglot("--version").split() == ["diglot", version], f"diglot --version says {version}")
    check("smollm2-from-gemma3" in diglot("recipes", "list"), "the recipes are in the wheel")
    schema, _ = json.JSONDecoder().raw_decode(diglot("config-schema"))  # what it says while it loads comes behind
    check("lmbda" in schema["properties"], "the schema of options is in the wheel")
    check("lmbda" in diglot("train", "--help"), "diglot train --help lists the options")

    student, teacher = make_models(folder)
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt": f"Say {word}.", "completion": f" {word}!"} for word in ("hello", "数学", "naïve", "one two")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    check("together" in diglot("estimate", student, teacher), "diglot estimate adds up memory")
    check("chunks" in diglot("align", student, teacher, TEXT), "diglot align shows a text")
    check(
        "can be trained" in diglot("inspect", student, teacher, "--data", str(prompts)), "diglot inspect has a verdict"
    )

    pair = ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--dataset_name", str(prompts)]
    for trainer in ("gkd", "minillm"):
        run = folder / trainer
        diglot("train", "--trainer", trainer, *pair, *STEP, *SHORT, "--output_dir", str(run))
        losses = [row["loss"] for row in logs(run) if "loss" in row]
        check(bool(losses) and all(math.isfinite(float(str(one))) for one in losses), f"{trainer} trains a step")
        check((run / "model.safetensors").exists(), f"{trainer} saves the student")

    shown = diglot(
        "eval", str(folder / "gkd"), "--teacher", teacher, "--data", str(prompts), "--max_completion_length", "8"
    )
    check("bits_per_byte" in shown, "diglot eval measures the student")
    if {"jinja2", "matplotlib"} <= {name.lower() for name in metadata.packages_distributions()}:
        diglot("report", str(folder / "gkd"))
        check((folder / "gkd" / "report.html").exists(), "diglot report writes its page")
    else:
        refused = diglot("report", str(folder / "gkd"), code=2)
        check("diglot[report]" in refused, "diglot report names the extra that it needs")


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.pop("PYTHONPATH", None)  # `-I` keeps it from this process, not from the commands
    with tempfile.TemporaryDirectory(prefix="diglot-smoke-") as scratch:
        smoke(Path(scratch))
    print(f"smoke test passed: diglot {metadata.version('diglot')}, Python {sys.version.split()[0]}")
