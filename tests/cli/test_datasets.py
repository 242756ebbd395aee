"""Datasets on the command line: what they are, where they are evaluated, what each command reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
from support import tiny

from diglot.cli.main import main

TURNS = [[{"from": "human", "value": f"Say {w}."}, {"from": "gpt", "value": f"{w}, as asked."}] for w in "abcdefgh"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("given")
    for name, tokenizer, seed in (("student", zoo.chatml(), 0), ("teacher", zoo.inst(), 1)):
        tiny.save(root / name, tokenizer, seed)
    chat = [*tiny.CHAT_ROWS, *tiny.CHAT_ROWS]
    rows = {
        "chat": chat,
        "turns": [{"conversations": turns} for turns in TURNS],
        "plain": [{"prompt": f"Say {w}.", "completion": f"{w}!"} for w in "abcd"],
        "qa": [{"question": f"Say {w}.", "answer": f"{w}!"} for w in "abcd"],
        "odd": [
            *tiny.CHAT_ROWS[:7],
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
        ],
    }
    for name, some in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return {path.stem if path.suffix else path.name: str(path) for path in root.iterdir()}


def train(folders: dict[str, str], out: Path, data: str, *more: str) -> int:
    return main([
        "train", "--model_name_or_path", folders["student"], "--teacher_model_name_or_path", folders["teacher"],
        "--dataset_name", data, "--output_dir", str(out), "--max_steps", "1", "--use_cpu", "true", "--lmbda", "0",
        "--max_completion_length", "4", "--per_device_train_batch_size", "2", "--disable_tqdm", "true",
        "--save_strategy", "no", "--logging_steps", "1", "--log_rollouts", "0", *more,
    ])  # fmt: skip


def logged(out: Path, name: str) -> list[float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


def test_the_option_that_a_refusal_names_trains(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folders, tmp_path / "out", folders["qa"]) == 2
    option = capsys.readouterr().err.split(" Give ")[1].split(", or in Python")[0].split()
    assert option == ["--dataset_columns", "user=question,assistant=answer"]
    assert train(folders, tmp_path / "out", folders["qa"], *option) == 0


def test_a_row_cut_in_an_emoji_stops_before_training(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "cut.jsonl"
    data.write_text(Path(folders["plain"]).read_text() + r'{"prompt": "Say e.", "completion": "e \ud83d"}' + "\n")
    assert train(folders, tmp_path / "out", str(data)) == 2
    assert f"{data} line 5 holds the lone surrogate U+D83D in `completion`" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_several_datasets_with_weights_train(folders: dict[str, str], tmp_path: Path) -> None:
    arguments = [{"name": folders["chat"], "weight": 3}, {"name": folders["turns"], "weight": 1, "format": "sharegpt"}]
    assert train(folders, tmp_path / "out", json.dumps(arguments)) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(Path(folders[one]).name in card and folders[one] not in card for one in ("chat", "turns"))


@pytest.mark.parametrize("how", ["file", "share"])
def test_rows_of_their_own_are_evaluated_on(how: str, folders: dict[str, str], tmp_path: Path) -> None:
    own = {"file": ["--eval_dataset_name", folders["chat"]], "share": ["--dataset_test_size", "0.25"]}[how]
    assert train(folders, tmp_path / "out", folders["chat"], *own, "--eval_strategy", "steps", "--eval_steps", "1") == 0
    assert logged(tmp_path / "out", "eval_bits_per_byte")


@pytest.mark.parametrize(("more", "message"), [
    (["--eval_dataset_name", "chat"], "eval_strategy is 'no': nothing is evaluated"),
    (["--eval_dataset_name", "chat", "--dataset_test_size", "2", "--eval_strategy", "epoch"], "Give one of them"),
    (["--dataset_test_size", "2", "--eval_strategy", "epoch", "--dataset_streaming"], "they are streamed"),
    (["--label_smoothing_factor", "0.1"], "no labels to smooth"),
])  # fmt: skip
def test_options_that_would_do_nothing_are_refused(
    more: list[str], message: str, folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folders, tmp_path / "out", folders["chat"], *(folders.get(part, part) for part in more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stream_trains(folders: dict[str, str], tmp_path: Path) -> None:
    options = ["--dataset_streaming", "--dataset_format", "sharegpt"]
    assert train(folders, tmp_path / "out", folders["turns"], *options) == 0
    assert logged(tmp_path / "out", "loss")[0] > 0


def test_a_row_with_a_picture_stops_or_is_skipped(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert train(folders, tmp_path / "out", folders["odd"]) == 2
    assert "odd.jsonl (train) row 7" in capsys.readouterr().err
    assert train(folders, tmp_path / "out", folders["odd"], "--on_bad_row", "skip") == 0
    assert "1 of 8 rows of train cannot be used and are left out" in caplog.text


def test_inspect_reads_as_train_does_and_hands_the_options_on(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ["inspect", folders["student"], folders["teacher"], "--json", "--data"]
    assert main([*pair, folders["turns"]]) == 2
    assert "--dataset_format sharegpt" in capsys.readouterr().err
    assert main([*pair, folders["turns"], "--dataset_format", "sharegpt"]) == 0
    verdict: dict[str, Any] = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict["command"].endswith("--dataset_format sharegpt")


def test_inspect_tells_of_prompts_that_no_template_is_used_for(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, warned in (("plain", True), ("chat", False)):
        assert main(["inspect", folders["student"], folders["teacher"], "--json", "--data", folders[name]]) == 0
        warnings = json.loads(capsys.readouterr().out)["verdict"]["warnings"]
        assert any("prompts of plain text" in warning for warning in warnings) is warned


def test_eval_and_score_read_such_rows_too(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", folders["turns"], "--dataset_format", "sharegpt"]
    small = ["--rows", "2", "--max_completion_length", "4", "--device", "cpu", "--json"]
    assert main(["eval", folders["student"], *data, *small]) == 0
    assert main(["score", "--teacher", folders["teacher"], *data, "--out", str(tmp_path / "scores")]) == 0
    assert "8 texts" in capsys.readouterr().out
