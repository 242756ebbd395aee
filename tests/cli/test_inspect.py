"""`diglot inspect` and `diglot align`: exit codes, JSON, no weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import support.tokenizers_zoo as zoo
from support import tiny
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from diglot.cli.main import COMMANDS, main


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders that hold a tokenizer alone, one whose bytes cannot be read, two models, and data."""
    root = tmp_path_factory.mktemp("pairs")
    for name in ("chatml", "inst", "unigram"):
        zoo.ALL[name]().save_pretrained(root / name)
    odd = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    odd.decoder = decoders.CTC()
    PreTrainedTokenizerFast(tokenizer_object=odd, eos_token="[UNK]").save_pretrained(root / "odd")
    for name, tokenizer in (("student", zoo.chatml()), ("teacher", zoo.inst())):
        tiny.save(root / name, tokenizer, padding_rows=7)
    (root / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.CHAT_ROWS), encoding="utf-8")
    return {path.name: str(path) for path in root.iterdir()}


def test_folders_with_a_tokenizer_alone_are_enough(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", folders["chatml"], folders["inst"], "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["verdict"]["trainable"] and record["models"] is None and record["same"] is False
    assert not list(Path(folders["chatml"]).glob("*.safetensors"))


def test_no_weights_are_read_unless_asked_for(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    assert main(["inspect", folders["student"], folders["teacher"], "--data", folders["chat.jsonl"], "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["student"]["rows"] == len(zoo.chatml()) + 7 and record["student"]["padding_rows"] == 7
    assert record["agreement"]["texts"] == len(tiny.CHAT_ROWS)


def test_with_models_adds_what_only_weights_say(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", folders["student"], folders["teacher"], "--data", folders["chat.jsonl"], "--with-models"]
    small = ["--model_rows", "3", "--batch_size", "2", "--max_completion_length", "4", "--device", "cpu"]
    assert main([*arguments, *small, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["models"]
    assert record["bits_per_byte_student"] > 0 and record["bits_per_byte_teacher"] > 0 and record["batch_size"] == 2
    assert main([*arguments, *small]) == 0
    assert "reverse KL of the student's samples" in capsys.readouterr().out


@pytest.mark.parametrize(("rows", "times"), [
    ([{"prompt": "A river", "completion": " runs down to the sea."}], 0),  # plain text needs no template
    ([{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}], 1),
    (None, 1),  # built-in texts: it is not known what will be given
])  # fmt: skip
def test_a_missing_template_is_said_once_where_it_matters(
    rows: list[dict[str, object]] | None, times: int, folders: dict[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or ()), encoding="utf-8")
    main(
        ["inspect", folders["chatml"], folders["unigram"], *(["--data", str(tmp_path / "rows.jsonl")] if rows else [])]
    )
    output = " ".join(capsys.readouterr().out.split()) + caplog.text
    assert output.count("has no chat template") == times, output
    assert "diglot objectives" in output or (times and rows)


@pytest.mark.parametrize(("student", "teacher", "data", "message"), [
    ("chatml", "odd", None, "does not say which bytes"),
    ("chatml", "unigram", "chat.jsonl", "no chat template"),
])  # fmt: skip
def test_a_pair_that_cannot_be_trained_is_exit_code_1(
    student: str, teacher: str, data: str | None, message: str, folders: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more = ["--data", folders[data]] if data else []
    assert main(["inspect", folders[student], folders[teacher], *more]) == 1
    out = capsys.readouterr().out
    assert message in " ".join(out.split()) and "cannot be trained" in out and "diglot train" not in out


@pytest.mark.parametrize(("arguments", "message"), [
    (["chatml"], "TEACHER"), (["chatml", "/no/where"], "/no/where"), (["chatml", "inst", "--rows", "0"], "--rows is 0"),
    (["chatml", "inst", "--data", "/none.jsonl"], "/none.jsonl"), (["chatml", "inst", "--jsn"], "--jsn"),
])  # fmt: skip
def test_a_wrong_argument_is_exit_code_2(
    arguments: list[str], message: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *(folders.get(text, text) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_align_prints_plain_ascii_into_a_pipe(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", folders["chatml"], folders["inst"], "naïve 数"]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and out.startswith("student |") and "\nteacher |" in out


def test_align_reads_standard_input(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("one two three"))
    assert main(["align", folders["chatml"], folders["inst"], "-"]) == 0
    piped = capsys.readouterr().out
    assert main(["align", folders["chatml"], folders["inst"], "one two three"]) == 0
    assert capsys.readouterr().out == piped


def test_help_of_every_command_has_an_example_fits_80_columns_and_loads_no_torch() -> None:
    code = (
        "import sys; from diglot.cli.main import COMMANDS, main\n"
        "for name in ('train', *COMMANDS):\n"
        "    try: main([name, '--help'])\n    except SystemExit: pass\n"
        "    print(chr(12), end='')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    for command, text in zip(("train", *COMMANDS), done.stdout.split("\f"), strict=False):
        assert text.startswith(f"usage: diglot {command}"), text
        assert "\nexample:\n" in text or "\nexamples:\n" in text, command
        shown = re.findall(r"^  (?:-h, )?(--[\w-]+)(?:, (--[\w-]+))?", text, re.MULTILINE)
        twice = [names for names in shown if names[0].replace("_", "-") == names[1].replace("_", "-")]
        assert twice == [], command
