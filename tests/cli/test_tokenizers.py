"""Tokenizers by name in the commands: arguments for loading them, and a folder whose only tokenizer is tekken.json."""

from __future__ import annotations

import base64
import json
import shlex
from pathlib import Path

import pytest
import support.tokenizers_zoo as zoo
from support import tiny
from transformers import PreTrainedTokenizerFast

from diglot.cli import loading, serve_teacher
from diglot.cli.inspect import inspect
from diglot.cli.main import main
from diglot.errors import ConfigError
from diglot.rendering import Renderer
from diglot.teachers.scored import ScoredTeacher
from diglot.vocabulary import load_tokenizer

FILE = {"tokenizer_class": "TokenizersBackend"}
TEMPLATE = "{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two models whose tokenizer_config.json declares a class that rebuilds tokenizer.json, and data."""
    root = tmp_path_factory.mktemp("pair")
    tiny.save_pair(root)
    for name in ("student", "teacher"):
        stated = root / name / "tokenizer_config.json"
        stated.write_text(json.dumps({**json.loads(stated.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    return {path.stem: str(path) for path in root.iterdir()}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Name of a side and class of its tokenizer, of each renderer that is made."""
    results: list[tuple[str, str]] = []
    made = Renderer.__init__

    def noting(self: Renderer, tokenizer: PreTrainedTokenizerFast, **options: object) -> None:
        results.append((Path(str(options.get("name"))).name, type(tokenizer).__name__))
        made(self, tokenizer, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Renderer, "__init__", noting)
    return results


@pytest.mark.parametrize("command", ["inspect", "eval", "score", "serve-teacher"])
def test_arguments_for_a_tokenizer_reach_the_side_that_they_are_of(
    command: str, folders: dict[str, str], loaded: list[tuple[str, str]], tmp_path: Path
) -> None:
    student, teacher, data = folders["student"], folders["teacher"], folders["data"]
    arguments = ["--teacher_tokenizer_kwargs", json.dumps(FILE)]
    if command == "inspect":
        assert inspect([student, teacher, "--data", data, *arguments]) == 0
    elif command == "eval":
        small = ["--max_completion_length", "4", "--rows", "2", "--json"]
        assert main(["eval", student, "--teacher", teacher, "--data", data, *small, *arguments]) == 0
    elif command == "score":
        assert main(["score", "--teacher", teacher, "--data", data, "--out", str(tmp_path / "s"), *arguments]) == 0
        assert type(ScoredTeacher(tmp_path / "s").renderer.tokenizer).__name__ == "TokenizersBackend"
    else:
        options = serve_teacher.parser().parse_args(["--student", student, "--teacher", teacher, *arguments])
        serve_teacher._scorer(options)
    of_student = set() if command == "score" else {("student", "GPT2Tokenizer")}
    assert set(loaded) == {*of_student, ("teacher", "TokenizersBackend")}


def test_the_command_that_inspect_prints_has_them_as_train_takes_them(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect([folders["student"], folders["teacher"], "--json", "--tokenizer_kwargs", json.dumps(FILE)]) == 0
    words = shlex.split(json.loads(capsys.readouterr().out)["verdict"]["command"])
    assert json.loads(words[words.index("--tokenizer_kwargs") + 1]) == FILE
    assert "--teacher_tokenizer_kwargs" not in words and loading.TOKENIZER_OPTIONS["student"] == "tokenizer_kwargs"


def test_a_base_model_gets_the_chat_template_in_a_file_on_either_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_pair(tmp_path)
    for name in ("student", "teacher"):
        (tmp_path / name / "chat_template.jinja").unlink()
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATE, encoding="utf-8")
    pair, data = [str(tmp_path / name) for name in ("student", "teacher")], ["--data", str(tmp_path / "data.jsonl")]
    options = {"--tokenizer_kwargs", "--teacher_tokenizer_kwargs"}
    assert inspect([*pair, *data, "--json"]) == 1
    advice = " ".join(json.loads(capsys.readouterr().out)["verdict"]["problems"])
    assert all(f"({option[2:]}: {{chat_template: FILE.jinja}})" in advice for option in options)
    words = [word for option in options for word in (option, json.dumps({"chat_template": str(file)}))]
    assert inspect([*pair, *data, "--json", *words]) == 0
    command = shlex.split(json.loads(capsys.readouterr().out)["verdict"]["command"])
    assert options <= set(command)
    run = ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--lmbda", "0", "--use_cpu", "true"]
    train = ["--model_name_or_path", pair[0], "--teacher_model_name_or_path", pair[1], "--dataset_name", data[1]]
    assert main(["train", *train, *run, "--disable_tqdm", "true", *words]) == 0
    assert load_tokenizer(str(tmp_path / "run")).chat_template == TEMPLATE
    (tmp_path / "student" / "chat_template.jinja").write_text("{{ 'another' }}")
    assert load_tokenizer(pair[0], {"chat_template": str(file)}).chat_template == TEMPLATE
    with pytest.raises(ConfigError, match=r"chat_template is 'absent.jinja', expected the text of a template"):
        load_tokenizer(pair[0], {"chat_template": "absent.jinja"})


def tekken(folder: Path) -> Path:
    """A model in `folder` beside a tekken.json of single bytes and a few merges; there is no other tokenizer."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"he", b"ll", b"llo", b"hello", b" h", b" hello"]
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
    stated = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+", "version": "v3",
            "num_vocab_tokens": len(tokens), "default_vocab_size": len(tokens) + len(names),
            "default_num_special_tokens": len(names),
        },
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(tokens)],
        "special_tokens": [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(names)],
    }  # fmt: skip
    folder.mkdir()
    (folder / "tekken.json").write_text(json.dumps(stated))
    tiny.tiny_model(load_tokenizer(str(folder)), 2).save_pretrained(folder)
    return folder


def test_a_folder_of_tekken_json_alone_is_read_and_trains_in_both_roles(
    folders: dict[str, str], tmp_path: Path
) -> None:
    place = str(tekken(tmp_path / "tekken"))
    tokenizer = load_tokenizer(place, {"chat_template": TEMPLATE})
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 5)
    assert tokenizer("say hello", add_special_tokens=False)["input_ids"] == [6 + i for i in (*b"say", 261)]
    assert Renderer(tokenizer).has_template
    common = ["--dataset_name", folders["data"], "--max_steps", "2", "--per_device_train_batch_size", "2"]
    common += ["--max_completion_length", "8", "--use_cpu", "true", "--disable_tqdm", "true", "--lmbda", "0"]
    common += ["--logging_steps", "1", "--save_strategy", "no"]
    for student, teacher in ((place, folders["teacher"]), (folders["student"], place)):
        out = tmp_path / Path(student).name.replace("tekken", "of")
        pair = ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--output_dir", str(out)]
        side = "tokenizer_kwargs" if student == place else "teacher_tokenizer_kwargs"
        assert main(["train", *pair, *common, f"--{side}", json.dumps({"chat_template": TEMPLATE})]) == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert len(losses) == 2 and min(losses) > 0
        assert load_tokenizer(str(out)).eos_token == ("</s>" if student == place else zoo.chatml().eos_token)
