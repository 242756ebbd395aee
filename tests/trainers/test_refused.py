"""What the Trainer offers, and would be ignored here or end a run late: it is refused at the start, or it works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
from datasets import Dataset, IterableDataset
from support import tiny

from diglot.errors import ConfigError, DataError
from diglot.objectives.scores import Path as TextPath
from diglot.objectives.span import Span
from diglot.options import GKDConfig, MiniLLMConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length.*share a micro-batch anyway"),
        ({"include_num_input_tokens_seen": "all"}, "would count 0.*num_tokens"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True.*Leave it at False"),
        ({"label_names": ["labels"]}, r"label_names=\['labels'\] is not allowed.*Leave it at None"),
        ({"prediction_loss_only": True}, "prediction_loss_only=True.*Leave it at False"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches=False.*Leave it at True"),
        ({"seq_kd": True, "lmbda": 1.0}, "seq_kd=True.*lmbda=1.0 leaves none"),
    ],
)
def test_options_that_would_do_nothing_or_stop_a_run_late_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        GKDConfig(output_dir=str(tmp_path), **options)


def test_metrics_of_predictions_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compute_metrics is never called"):
        tiny.gkd(tmp_path / "run", zoo.chatml(), zoo.inst(), keywords={"compute_metrics": lambda p: {}})
    assert not (tmp_path / "run").exists()


def test_predict_names_what_to_call_instead(tmp_path: Path) -> None:
    trainer = tiny.gkd(tmp_path, zoo.chatml(), zoo.inst())
    with pytest.raises(ConfigError, match=r"evaluate\(\)"):
        trainer.predict(Dataset.from_list(tiny.CHAT_ROWS[:2]))


@pytest.mark.parametrize("named", [False, True])
def test_a_stream_to_evaluate_on_is_refused_at_the_start(named: bool, tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(tiny.CHAT_ROWS))
    with pytest.raises(DataError, match="eval_dataset is a stream"):
        keywords = {"eval_dataset": {"a": stream} if named else stream}
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), keywords=keywords)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("bits_per_byte", False),
        ("eval_test_bits_per_byte", False),
        ("eval_reverse_kl_nats_per_byte", False),
        ("eval_loss", False),
        ("stop_agreement", True),
    ],
)
def test_the_best_checkpoint_is_the_one_with_fewer_bits(metric: str, greater: bool, tmp_path: Path) -> None:
    common: dict[str, Any] = {"output_dir": str(tmp_path), "metric_for_best_model": metric}
    assert GKDConfig(**common).greater_is_better is greater
    assert MiniLLMConfig(**common, greater_is_better=not greater).greater_is_better is not greater


def test_the_order_of_minillms_rows_follows_its_options(tmp_path: Path) -> None:
    def order(**options: Any) -> list[int]:
        trainer = tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), num_iterations=1, **options)
        return list(trainer._get_train_sampler())

    assert order(train_sampling_strategy="sequential") == list(range(8))
    assert sorted(order()) == list(range(8)) != order()
    assert order(data_seed=0) != order() == order(data_seed=42)  # seed is 42


def test_span_beside_minillm_remembers_the_policy_that_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over inner epochs the ratio is to what the student was, not to what it has become."""
    moved: list[float] = []
    plain = Span.__call__

    def watched(self: Span, path: TextPath, alignment: Any) -> Any:
        assert path.logp_old is not None
        moved.append(float((path.logp_s - path.logp_old).detach().abs().max()))
        return plain(self, path, alignment)

    monkeypatch.setattr(Span, "__call__", watched)
    options = {"objective": "span", "num_iterations": 2, "teacher_mixed_alpha": 0.0, "learning_rate": 1e-2}
    tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), **options).train()
    first, second = moved
    assert first < 1e-6 < second
    with pytest.raises(ConfigError, match=r"num_iterations=2 .* kd_temperature=2\.0"):
        tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), **options, kd_temperature=2.0)


def test_minillm_says_that_it_writes_from_another_distribution(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), temperature=0.7)
    assert "temperature=0.7, top_p=1.0, top_k=0" in caplog.text
    caplog.clear()
    tiny.minillm(tmp_path, zoo.chatml(), zoo.inst())
    assert "does not write from its own distribution" not in caplog.text
