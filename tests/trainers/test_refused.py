"""What the Trainer offers, and would be ignored here or end a run late: it is refused at the start, or it works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from datasets import Dataset, IterableDataset
from support import tiny

from diglot.errors import ConfigError, DataError
from diglot.objectives.scores import Path as TextPath
from diglot.objectives.span import Span
from diglot.options import GKDConfig, MiniLLMConfig
from diglot.trainers import GKDTrainer


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
        ({"bf16_full_eval": True}, "bf16_full_eval=True.*Leave it at False"),
        ({"use_vllm": True, "lmbda": 0, "seq_kd": True}, "use_vllm=True.*with lmbda=0 all texts are the teacher's"),
        ({"teacher_cache_dir": "kept", "lmbda": 1}, "teacher_cache_dir='kept'.*lmbda=1 with seq_kd=False leaves no"),
        ({"teacher_cache_dir": "kept", "seq_kd": True}, "teacher_cache_dir='kept'.*seq_kd=True leaves no step"),
        ({"seq_kd": "no"}, "seq_kd='no' is not allowed: it must be true or false"),
        ({"num_generations": 1.5}, "num_generations=1.5 is not allowed: it must be a whole number"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps=1.5 .*a whole number, 1 or more"),
    ],
)
def test_options_that_would_do_nothing_or_stop_a_run_late_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        GKDConfig(output_dir=str(tmp_path), **options)


OBJECTIVES: list[tuple[Any, str]] = [
    ([{"name": "strict", "weight": -1}], "weight of objective 'strict' is -1: give a number, 0 or more"),
    ([{"name": "strict", "weight": "much"}], "weight of objective 'strict' is 'much'"),
    ([{"name": "strict", "weight": float("nan")}], "weight of objective 'strict' is nan"),
    ([{"name": "strict", "weight": 0}], "All weights of objective 'strict' are 0"),
    (None, "objective entry None is neither a name nor a mapping"),
    ([["strict", 1.0]], r"objective entry \['strict', 1.0\] is neither"),
    (len, "objective entry <built-in function len> is neither.*package.module:Class"),
]


@pytest.mark.parametrize(("objective", "message"), OBJECTIVES)
def test_an_objective_without_a_meaning_is_refused(objective: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), objective=objective)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rkl_advantage": False, "gamma": 0.5}, "gamma=0.5 has no part in objective 'single_step'"),
        ({"rkl_advantage": False, "reward_clip": 9.0}, "reward_clip=9.0 has no part"),
        ({"lm_coef": 0.5}, "lm_coef=0.5 weighs a loss on texts to imitate, and there are none"),
        ({"objective": [{"name": "auto", "beta": 0.0}]}, "'auto' of MiniLLM takes a weight alone, not beta"),
        ({"reference_model_name_or_path": "before"}, "reference_model_name_or_path='before' has no part"),
    ],
)
def test_minillm_refuses_options_that_no_term_uses(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"teacher_model_init_kwargs": {"dtype": "float32"}},
            "how to load the teacher's model, and a LlamaForCausalLM",
        ),
        ({"teacher_tokenizer_name_or_path": "other"}, "='other' says how to load the teacher's tokenizer"),
        ({"teacher_tokenizer_kwargs": {"use_fast": True}}, "how to load the teacher's tokenizer"),
        ({"tokenizer_kwargs": {"use_fast": True}}, "how to load the student's tokenizer"),
        ({"teacher_model_revision": "main"}, "teacher_model_revision='main' says how to load the teacher"),
    ],
)
def test_how_to_load_what_is_loaded_already_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), **options)


def test_the_options_of_the_other_trainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="args is a MiniLLMConfig, and this trainer's options are a GKDConfig"):
        GKDTrainer("student", "teacher", MiniLLMConfig(output_dir=str(tmp_path)))  # type: ignore[arg-type]


def _adapter() -> dict[str, Any]:
    return {"peft_config": pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj"])}


@pytest.mark.parametrize("adapter", [False, True])
def test_a_teacher_with_the_students_weights_is_refused(adapter: bool, tmp_path: Path) -> None:
    """Below an adapter it would follow the student, with a loss of zero in every step."""
    model = tiny.tiny_model(zoo.chatml())
    with pytest.raises(ConfigError, match=r"shares weights with the student's.*'self' as the teacher"):
        keywords = _adapter() if adapter else {}
        tiny.gkd(tmp_path, zoo.chatml(), zoo.chatml(), models=(model, model), keywords=keywords)
    assert all(p.requires_grad for p in model.parameters())


def test_a_student_without_trainable_weights_is_refused(tmp_path: Path) -> None:
    models = tiny.tiny_model(zoo.chatml()).requires_grad_(False), tiny.tiny_model(zoo.inst(), 1)
    with pytest.raises(ConfigError, match="No weight of the student is trainable"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), models=models)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_weights_without_values_are_refused(side: str, tmp_path: Path) -> None:
    models = {"student": tiny.tiny_model(zoo.chatml()), "teacher": tiny.tiny_model(zoo.inst(), 1)}
    models[side].to("meta")
    with pytest.raises(ConfigError, match=f"weights of the {side} are on the device 'meta'"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), models=(models["student"], models["teacher"]))


def test_weights_that_are_no_numbers_are_named_as_such(tmp_path: Path) -> None:
    student, teacher = tiny.tiny_model(zoo.chatml()), tiny.tiny_model(zoo.inst(), 1)
    with torch.no_grad():
        teacher.lm_head.weight[5] = torch.nan
    with pytest.raises(ConfigError, match=r"gives logits that are no finite numbers.*NaN or infinite"):
        tiny.gkd(tmp_path, zoo.chatml(), zoo.inst(), models=(student, teacher))


def test_minillm_says_that_noise_of_embeddings_is_in_its_ratios(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), neftune_noise_alpha=5.0)
    assert "neftune_noise_alpha=5.0 adds noise" in caplog.text


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
    """The policy is the one whose log-probs are taken: at `kd_temperature`."""
    for options in (dict(temperature=0.7), dict(kd_temperature=0.7)):
        tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), **options)
        assert "temperature=0.7" in caplog.text and "top_p=1.0, top_k=0" in caplog.text
        caplog.clear()
    for temperature in (1.0, 0.7):
        tiny.minillm(tmp_path, zoo.chatml(), zoo.inst(), temperature=temperature, kd_temperature=temperature)
    assert "does not write from its own distribution" not in caplog.text
