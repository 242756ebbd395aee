"""Training from kept scores is training from the teacher, without its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from support import tiny
from torch import Tensor

from diglot.data import to_sample
from diglot.errors import ConfigError, TeacherError
from diglot.rendering import Renderer
from diglot.teachers import LocalTeacher
from diglot.teachers.scoring import Manner, Reading, score_texts
from diglot.trainers import GKDTrainer

ROWS = tiny.CHAT_ROWS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Scores of one teacher at every level; its weights are gone."""
    root = tmp_path_factory.mktemp("scores")
    model = tiny.tiny_model(zoo.inst(), 1)
    renderer = Renderer(zoo.inst(), num_embeddings=len(zoo.inst()), generation_config=model.generation_config)
    samples = [to_sample(row, f"row {i}") for i, row in enumerate(ROWS)]
    for level in ("logprobs", "top_k", "bytes"):
        manner = Manner(level, k=20, batch_size=3, shard_texts=3)
        eos = model.generation_config.eos_token_id
        score_texts(
            LocalTeacher(model, renderer), samples, root / level, data="rows", reading=Reading(), manner=manner,
            generation_eos=eos,
        )  # fmt: skip
    return {level: root / level for level in ("logprobs", "top_k", "bytes")}


def from_scores(tmp_path: Path, student: Any, folder: Path, objective: Any, **options: Any) -> GKDTrainer:
    return tiny.gkd(
        tmp_path, student, None, ROWS, models=(tiny.tiny_model(student, 0), str(folder)), objective=objective,
        **{"lmbda": 0.0, **options},
    )  # fmt: skip


def loss_and_gradient(trainer: Any) -> tuple[float, Tensor]:
    batches = [trainer.data_collator(ROWS[i : i + 4]) for i in (0, 4)]
    trainer.model.zero_grad()
    total = 0.0
    for inputs in trainer.get_batch_samples(iter(batches), 2, trainer.args.device)[0]:
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.ravel() for p in trainer.model.parameters()])


CASES = [
    ("logprobs", "span", 1e-5),
    ("logprobs", "alm", 1e-5),
    ("logprobs", "sequence_kl", 1e-5),
    ("top_k", "top_k", 1e-5),
    ("top_k", [{"name": "alm"}, {"name": "top_k", "k": 8, "weight": 0.5}], 1e-5),
    ("bytes", "byte", 2e-3),  # float16
    ("bytes", [{"name": "byte", "beta": 1.0}, {"name": "span"}], 2e-3),
]


@pytest.mark.parametrize(("level", "objective", "tolerance"), CASES)
@pytest.mark.parametrize("student", ["chatml", "turns", "inst"])
def test_loss_and_gradient_are_those_of_the_teacher_itself(
    tmp_path: Path, folders: dict[str, Path], student: str, level: str, objective: Any, tolerance: float
) -> None:
    """Whatever the student's tokenizer, the teacher's own included."""
    own = zoo.ALL[student]()
    stored = from_scores(tmp_path / "kept", own, folders[level], objective)
    direct = tiny.gkd(tmp_path / "asked", own, zoo.inst(), ROWS, lmbda=0.0, objective=objective)
    result, gradient = loss_and_gradient(stored)
    expected, other = loss_and_gradient(direct)
    assert result == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert (gradient - other).norm() <= 5 * tolerance * other.norm() + 1e-7


def test_no_weights_of_the_teacher_are_loaded(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    moved = tmp_path / "elsewhere"
    shutil.copytree(folders["bytes"], moved)
    trainer = from_scores(tmp_path / "run", zoo.turns(), moved, "byte", num_train_epochs=2, max_steps=-1)
    before = tiny.parameters(trainer.model)
    trainer.train()
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    assert not any(path.suffix == ".safetensors" and "shard" not in path.name for path in moved.rglob("*"))
    assert "bits_per_byte" in str(trainer.evaluate(trainer.train_dataset))  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["strict", "bpm", "jsd"])
def test_objectives_of_a_higher_rung_are_refused_with_those_that_work(
    tmp_path: Path, folders: dict[str, Path], objective: str
) -> None:
    student = zoo.inst() if objective == "jsd" else zoo.chatml()
    with pytest.raises(TeacherError, match="alm"):
        from_scores(tmp_path, student, folders["logprobs"], objective)
    with pytest.raises(TeacherError, match="byte"):
        from_scores(tmp_path, student, folders["bytes"], objective)


def test_more_likeliest_ids_than_were_kept_are_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(TeacherError, match="holds 20"):
        from_scores(tmp_path, zoo.chatml(), folders["top_k"], [{"name": "top_k", "k": 21}])


@pytest.mark.parametrize(("options", "message"), [({"lmbda": 0.5}, "lmbda=0.5"), ({"seq_kd": True}, "seq_kd=True")])
def test_a_run_that_writes_its_own_texts_is_refused(
    tmp_path: Path, folders: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        from_scores(tmp_path, zoo.chatml(), folders["logprobs"], "alm", **options)
    with pytest.raises(ConfigError, match="MiniLLM"):
        tiny.minillm(
            tmp_path, zoo.chatml(), None, ROWS, models=(tiny.tiny_model(zoo.chatml()), str(folders["logprobs"]))
        )


def test_other_rows_than_were_scored_are_an_error(tmp_path: Path, folders: dict[str, Path]) -> None:
    other = [{"prompt": "Say:", "completion": "something else"}]
    trainer = tiny.gkd(
        tmp_path, zoo.chatml(), None, other, lmbda=0.0,
        models=(tiny.tiny_model(zoo.chatml()), str(folders["logprobs"])),
        objective="alm",
    )  # fmt: skip
    with pytest.raises(TeacherError, match="not among the 8"):
        trainer.train()


def test_temperatures_that_the_scores_do_not_have_are_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="kd_temperature"):
        from_scores(tmp_path, zoo.chatml(), folders["bytes"], "byte", kd_temperature=2.0)
