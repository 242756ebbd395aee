"""Files and rows from others: they are read, they do not run, and they take no more memory than is allowed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from transformers import PreTrainedTokenizerFast

from diglot.cli.main import main
from diglot.data import to_sample
from diglot.data.samples import LONGEST
from diglot.errors import DataError, RenderingError
from diglot.rendering import Conversation, Renderer
from diglot.rendering.template_process import TemplateProcess
from diglot.teachers import CachedTeacher
from diglot.vocabulary import cache as tables


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.save_pair(root)
    return root


@pytest.fixture
def files(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "files"))


def command(files: Path, *more: str) -> list[str]:
    return [
        "train", "--model_name_or_path", str(files / "student"), "--teacher_model_name_or_path", str(files / "teacher"),
        "--dataset_name", str(files / "data.jsonl"), "--output_dir", str(files / "out"), "--max_steps", "1",
        "--use_cpu", "--max_completion_length", "4", "--disable_tqdm", *more,
    ]  # fmt: skip


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("allowed", [False, True])
def test_pickled_weights_are_refused_and_never_run(
    side: str, allowed: bool, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where pickles are asked for: then they are read as weights only."""
    mark = files / "ran"
    (files / side / "model.safetensors").unlink()
    torch.save({"bomb": Bomb(mark)}, files / side / "pytorch_model.bin")
    option = {"student": "--model_init_kwargs", "teacher": "--teacher_model_init_kwargs"}[side]
    extra = [option, '{"use_safetensors": false}'] if allowed else []
    assert main(command(files, *extra)) == 2
    error = capsys.readouterr().err
    assert ("eights only" if allowed else "safetensors") in error
    assert not mark.exists() and not (files / "out").exists()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("what", ["config", "tokenizer_config"])
def test_code_beside_a_model_does_not_run_unless_it_is_asked_for_that_very_model(
    side: str, what: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other side's permission does not count; nobody is asked on the terminal."""
    mark = files / "ran"
    (files / side / "theirs.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    path = files / side / f"{what}.json"
    record = json.loads(path.read_text())
    if what == "config":
        record |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    else:
        record |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.T", "theirs.T"]}}
    path.write_text(json.dumps(record))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    other = {"student": "--teacher_trust_remote_code", "teacher": "--trust_remote_code"}[side]
    code = main(command(files, other))
    assert not mark.exists()
    if what == "config":
        assert code == 2 and "trust_remote_code" in capsys.readouterr().err


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'].system('touch MARK') }}",
    "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
    "{% set x = messages.append({'role': 'user', 'content': 'x'}) %}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(1000000000) %}x{% endfor %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_cannot_leave_its_sandbox(template: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=zoo.inst().backend_tokenizer, eos_token="</s>")
    tokenizer.chat_template = template.replace("MARK", str(mark))
    with pytest.raises(RenderingError):
        Renderer(tokenizer, name="teacher").prompt_ids(Conversation(({"role": "user", "content": "hello"},)))
    assert not mark.exists()


BOMBS = [
    "{{ 'x' * 10 ** 10 }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ 'x'.center(10 ** 10) }}",
    "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[0]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
]


@pytest.mark.parametrize("template", BOMBS)
def test_a_chat_template_cannot_fill_the_memory(template: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=zoo.inst().backend_tokenizer, eos_token="</s>")
    tokenizer.chat_template, before = template, memory()
    with pytest.raises(RenderingError, match=r"The teacher's chat template .* more than the 1024 MiB"):
        Renderer(tokenizer, name="teacher").prompt_ids(Conversation(({"role": "user", "content": "hello"},)))
    assert memory() - before < 64 * 2**20
    assert Renderer(zoo.chatml(), name="student").has_template  # what comes after it is rendered


def endless(seconds: float) -> tuple[TemplateProcess, dict[str, Any]]:
    """A process, and what makes it work for hours."""
    line = [{"role": "user", "content": "x"}]
    long = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    return TemplateProcess(seconds=seconds), {"conversation": line, "tokenize": False, "chat_template": long}


def test_a_chat_template_cannot_go_on_for_ever() -> None:
    process, slow = endless(1.0)
    with pytest.raises(RenderingError, match="more than the 1 s that a template may have"):
        process.render(slow)
    assert process.render({**slow, "chat_template": "{{ 6 * 7 }}"}) == "42"
    process.close()


def test_a_template_sees_no_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    process, slow = endless(30.0)
    process.render({**slow, "chat_template": "{{ 6 * 7 }}"})
    (child,) = psutil.Process().children()[-1:]
    assert "hf_secret" not in str(child.environ()) and "PATH" in child.environ()
    process.close()


def test_a_fork_renders_with_a_process_of_its_own() -> None:
    """As the data workers of a loader are."""
    process, job = endless(30.0)
    job["chat_template"] = "{{ messages[0].content }}"
    assert process.render(job) == "x"
    child = os.fork()
    if child == 0:
        os._exit(0 if process.render({**job, "conversation": [{"content": "y"}]}) == "y" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert process.render(job) == "x"
    process.close()


def test_what_a_row_says_is_text_and_no_template() -> None:
    renderer = Renderer(zoo.chatml(), name="student")
    ids = renderer.prompt_ids(Conversation(({"role": "user", "content": "{{ 7 * 6 }}{% raw %}"},)))
    text = renderer.tokenizer.decode(ids)
    assert "{{ 7 * 6 }}{% raw %}" in text and "42" not in text


@pytest.mark.parametrize("column", ["prompt", "text", "messages"])
def test_a_row_is_bounded(column: str) -> None:
    long = "x" * (LONGEST + 1)
    value: Any = [{"role": "user", "content": long}] if column == "messages" else long
    with pytest.raises(DataError, match=rf"data\.jsonl row 7 holds \d+ characters, expected at most {LONGEST}"):
        to_sample({column: value}, "data.jsonl row 7")


def test_a_script_in_a_dataset_folder_does_not_run(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, mark = files / "rows", files / "ran"
    folder.mkdir()
    (folder / "rows.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    assert main(command(files, "--dataset_name", str(folder))) == 2
    assert not mark.exists() and "cannot be read as a dataset" in capsys.readouterr().err


def memory() -> int:
    """The largest that this process has been, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("length", [1 << 40, (1 << 63) - 1, 200_000_000])
def test_a_huge_header_is_refused_without_being_read(
    length: int, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of weights, and of an entry of either cache: those are made anew."""
    before = memory()
    for path in (files / "student" / "model.safetensors", files / "entry.safetensors"):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
    trainer = tiny.gkd(files / "x", zoo.chatml(), zoo.inst())
    assert CachedTeacher(trainer.comparisons[0].teacher, files / "cache")._read(files / "entry.safetensors", 3) is None
    assert tables._read(files / "entry.safetensors", {}) is None
    assert main(command(files)) == 2 and "header too large" in capsys.readouterr().err
    assert memory() - before < 300e6 and not (files / "out").exists()


def test_a_huge_entry_of_the_tables_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "entry.safetensors"
    with path.open("wb") as file:
        file.truncate(tables.LARGEST + 1)  # sparse
    before = memory()
    assert tables._read(path, {}) is None and memory() - before < 100e6


def test_an_entry_of_the_teachers_cache_that_is_a_link_or_a_pickle_is_not_believed(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path / "run", zoo.chatml(), zoo.inst())
    cached, mark = CachedTeacher(trainer.comparisons[0].teacher, tmp_path / "cache"), tmp_path / "ran"
    torch.save({"hidden": Bomb(mark)}, tmp_path / "pickle.safetensors")
    (tmp_path / "secret").write_text("not for you")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "secret")
    for name in ("pickle.safetensors", "link.safetensors"):
        assert cached._read(tmp_path / name, 3) is None
    assert not mark.exists()


@pytest.mark.real
def test_training_needs_no_network_and_asks_for_none(files: Path) -> None:
    """With every look-up and every connection an error, and without the switch that says offline."""
    code = (
        "import sys\n"
        "def hook(event, given):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto'):\n"
        "        print('NETWORK', event, given, file=sys.stderr, flush=True)\n"
        "        raise PermissionError('no network')\n"
        "sys.addaudithook(hook)\n"
        "from diglot.cli.main import main\n"
        "raise SystemExit(main(sys.argv[1:]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k}
    arguments = command(files, "--save_strategy", "steps", "--save_steps", "1")
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr[-3000:]
    assert (files / "out" / "model.safetensors").exists()
