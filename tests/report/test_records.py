"""What a run appends to its files, and what it takes back when it goes on from an older checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny

from diglot.report.records import append, keep, read
from diglot.trainers import GKDTrainer


def run(out: Path, resume: Any = None, make: Any = tiny.gkd, **options: Any) -> GKDTrainer:
    common: dict[str, Any] = {"lmbda": 1.0} if make is tiny.gkd else {}
    common |= dict(log_rollouts=2, max_completion_length=16, save_strategy="steps", save_steps=2, max_steps=4)
    trainer = make(out, zoo.chatml(), zoo.inst(), **{**common, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def steps(out: Path, name: str, phase: str | None = None) -> list[int]:
    return [r["step"] for r in read(out / name) if r.get("phase") == phase and "train_runtime" not in r]


def test_a_line_is_whole_json_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    append(tmp_path / "a.jsonl", {"step": 1, "x": math.nan, "deep": [{"y": math.inf}], "text": "é\n"})
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8")) == {
        "step": 1, "x": None, "deep": [{"y": None}], "text": "é\n",
    }  # fmt: skip


def test_a_line_that_a_crash_cut_is_left_out_and_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste', encoding="utf-8")
    assert [r["step"] for r in read(path)] == [1, 2]
    keep(path, lambda record: record["step"] <= 1)
    append(path, {"step": 2})
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl:2"):
        read(tmp_path / "a.jsonl")


def test_every_logged_step_and_both_ends_are_in_the_files(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    results = [r for r in read(tmp_path / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in results] == [1, 2, 3, 4]
    assert [r["align/coverage"] for r in results] == [entry["align/coverage"] for entry in logged]
    assert steps(tmp_path, "rollouts.jsonl", "training") == [0, 0, 1, 1, 2, 2, 3, 3]
    assert steps(tmp_path, "rollouts.jsonl", "before") == [0, 0]
    assert steps(tmp_path, "rollouts.jsonl", "after") == [4, 4]
    ends = [r for r in read(tmp_path / "metrics.jsonl") if "phase" in r]
    assert [(r["phase"], r["step"]) for r in ends] == [("before", 0), ("after", 4)]
    assert all(r["fixed/kl_nats_per_byte"] is not None and r["fixed/bits_per_byte"] > 0 for r in ends)


@pytest.mark.parametrize("make", [tiny.gkd, tiny.minillm])
def test_going_on_from_an_older_checkpoint_drops_what_came_after_it(tmp_path: Path, make: Any) -> None:
    """The files of a run that went back to step 2 are those of one that ran through."""
    run(tmp_path, make=make)
    rollouts = read(tmp_path / "rollouts.jsonl")
    run(tmp_path, make=make, resume=str(tmp_path / "checkpoint-2"))
    assert steps(tmp_path, "metrics.jsonl") == [1, 2, 3, 4]
    assert read(tmp_path / "rollouts.jsonl") == rollouts


def test_a_new_run_sets_the_files_of_an_older_one_aside(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2)
    old = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    run(tmp_path, max_steps=1)
    assert (tmp_path / "metrics.jsonl.old").read_text(encoding="utf-8") == old
    assert steps(tmp_path, "metrics.jsonl") == [1]


def test_an_evaluation_before_the_first_step_belongs_to_the_run(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), max_steps=1)
    trainer.evaluate(trainer.train_dataset)
    trainer.train()
    records = read(tmp_path / "metrics.jsonl")
    assert records[0]["step"] == 0 and "eval_loss" in records[0] and "loss" in records[1]


def test_watching_does_not_change_what_is_trained(tmp_path: Path) -> None:
    """Parameters after three steps with dropout, with rollouts and without: bit for bit."""
    results = []
    for count in (0, 3):
        models = tiny.tiny_model(zoo.chatml(), 0, attention_dropout=0.2), tiny.tiny_model(zoo.inst(), 1)
        results.append(
            run(tmp_path / str(count), log_rollouts=count, max_steps=3, models=models, disable_dropout=False, lmbda=0.5)
        )
    pairs = zip(results[0].model.parameters(), results[1].model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert not (tmp_path / "0" / "rollouts.jsonl").exists() and (tmp_path / "3" / "rollouts.jsonl").exists()


def test_a_rollout_holds_the_log_likelihoods_of_the_text_itself(tmp_path: Path) -> None:
    """Sums over chunks against each model's own pass over its own tokens, one sample at a time."""
    models = tiny.tiny_model(zoo.chatml(), 0), tiny.tiny_model(zoo.inst(), 1)
    trainer = run(tmp_path, models=models, max_steps=1, learning_rate=0.0, log_rollouts=8, max_completion_length=24)
    checked = 0
    for record in [r for r in read(tmp_path / "rollouts.jsonl") if r["phase"] == "before" and r["num_bytes"]]:
        text = "".join(c["text"] for c in record["chunks"] if not c["stop"])
        if not all(c["comparable"] for c in record["chunks"]) or text != record["completion"]:
            continue
        row = next(r for r in tiny.CHAT_ROWS if str(r["messages"][0]["content"]) in record["prompt"])
        conversation = trainer.data_collator([row])["samples"][0].conversation
        renderer, model = trainer.comparisons[0].teacher.renderer, trainer.comparisons[0].teacher.model
        ids = renderer.render(conversation, text, stopped=False).ids
        start = len(renderer.prompt_ids(conversation))
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, start - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, torch.from_numpy(ids[start:])[:, None]).sum().item()
        assert sum(c["logp_t"] for c in record["chunks"] if not c["stop"]) == pytest.approx(logp, abs=2e-3)
        first = record["chunks"][0]
        best = logits[0].softmax(-1).topk(3)
        assert [p for _, p in first["top_t"]] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert [t for t, _ in first["top_t"]] == [renderer.vocabulary.display(i) for i in best.indices.tolist()]
        assert "".join(first["teacher"]).encode("utf-8") == first["text"].encode("utf-8") or "\\x" in first["text"]
        checked += 1
    assert checked >= 3


def test_tensorboard_gets_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run(tmp_path, report_to=["tensorboard"], max_steps=2, log_rollouts=4)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    for name in ("align/coverage", "rollouts/stop_agreement", "completions/mean_bytes"):
        logged = [r[name] for r in read(tmp_path / "metrics.jsonl") if "loss" in r]
        assert [e.value for e in events.Scalars(f"train/{name}")] == pytest.approx(logged), name


def test_the_screen_shows_the_numbers_that_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, disable_tqdm=False, max_steps=2, log_rollouts=4)
    lines = [line for line in capsys.readouterr().out.replace("\r", "\n").splitlines() if line.startswith("step ")]
    assert len(lines) == 2 and all("loss " in line and "coverage 100.0%" in line and "stop " in line for line in lines)
