"""Plug-ins of other engines: TRL's own trainer runs; the others get objects of the shapes that their code has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
import torch
from datasets import Dataset
from support import proxy as made
from support.proxy import MODEL, STUDENT, TEACHER, context, expected
from support.teacher_server import TeacherServer
from support.tiny import tiny_model

from diglot.engines import Projector
from diglot.engines.plugins import prime_rl, slime, tinker, verl
from diglot.engines.plugins.connect import connect
from diglot.engines.serving.scorer import Scorer
from diglot.engines.serving.upstream import LocalUpstream
from diglot.errors import ConfigError, DataError, TeacherError

ASK = "Well?"
LENGTH = len(STUDENT.prompt_ids(made.Conversation(({"role": "user", "content": ASK},))))
HALF = next(i for i in range(300) if STUDENT.vocabulary.token(i) == "数".encode()[:1])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The tokenizers on disk, and a teacher's server in SGLang's form."""
    root = tmp_path_factory.mktemp("pair")
    zoo.chatml().save_pretrained(root / "student")
    zoo.inst().save_pretrained(root / "teacher")
    server = TeacherServer(MODEL, zoo.inst())
    server.form = "sglang"
    server.start()
    yield {"student": str(root / "student"), "teacher": str(root / "teacher"), "url": server.url}
    server.stop()


def own_logps(count: int) -> list[float]:
    return (-np.random.default_rng(0).exponential(0.5, count)).tolist()


def sums_agree(logps: list[float], ids: list[int]) -> None:
    """The sum over the completion is the teacher's, whatever the credit."""
    right = [r for r in expected(ids, ASK, LENGTH) if r is not None]
    assert sum(logps) == pytest.approx(sum(right), abs=1e-3)


# ---- slime ---------------------------------------------------------------------------------------------------------


@dataclass
class SlimeSample:
    """The fields of slime's `slime/utils/types.py` that its reward functions read (main, 2026-08)."""

    tokens: list[int] = field(default_factory=list)
    response_length: int = 0
    rollout_log_probs: list[float] | None = None
    reward: Any = None
    teacher_log_probs: Any = None

    def get_reward_value(self, args: Any) -> Any:
        return self.reward if not args.reward_key else self.reward[args.reward_key]


def slime_args(pair: dict[str, str], **change: Any) -> SimpleNamespace:
    own = {"hf_checkpoint": pair["student"], "rm_url": f"{pair['url']}/generate", "reward_key": None}
    return SimpleNamespace(**{**own, "diglot_teacher_tokenizer": pair["teacher"], **change})


def test_slime_gets_the_teachers_log_probs_of_its_response(pair: dict[str, str]) -> None:
    texts = [context(), [*context("one two three", stop=False), HALF]]
    samples = []
    for ids in texts:
        length = len(ids) - LENGTH
        samples.append(SlimeSample(ids, length, own_logps(length)))
    args = slime_args(pair)

    async def reward() -> None:
        for sample in samples:
            sample.reward = await slime.reward_func(args, sample)

    asyncio.run(reward())
    assert slime.post_process_rewards(args, samples) == ([0.0, 0.0], [0.0, 0.0])
    for sample in samples:
        assert (
            sample.teacher_log_probs.dtype == torch.float32 and len(sample.teacher_log_probs) == sample.response_length
        )
    sums_agree(samples[0].teacher_log_probs.tolist(), texts[0])
    own = samples[1].rollout_log_probs
    assert own is not None and samples[1].reward["valid"][-1] is False
    assert samples[1].teacher_log_probs[-1].item() == pytest.approx(own[-1]), "no difference where nothing is known"


def test_a_sample_of_slimes_without_a_response_has_no_scores_and_stops_nothing(pair: dict[str, str]) -> None:
    sample = SlimeSample(context()[:LENGTH], 0, None)
    result = asyncio.run(slime.reward_func(slime_args(pair), sample))
    assert result["teacher_log_probs"] == [] and result["valid"] == []


def test_slime_is_told_what_is_missing(pair: dict[str, str]) -> None:
    sample = SlimeSample(context(), 5, None)
    with pytest.raises(DataError, match=r"rollout_log_probs of shape \(0,\), .* a response of 5 of them"):
        asyncio.run(slime.reward_func(slime_args(pair), sample))
    with pytest.raises(ConfigError, match="diglot_teacher_tokenizer"):
        asyncio.run(slime.reward_func(slime_args(pair, diglot_teacher_tokenizer=None), sample))
    with pytest.raises(ConfigError, match="no rm_url"):
        asyncio.run(slime.reward_func(slime_args(pair, rm_url=None), sample))
    longer = SlimeSample([5, 6], 3, [-1.0] * 3)
    with pytest.raises(DataError, match="2 tokens and a response of 3 of them"):
        asyncio.run(slime.reward_func(slime_args(pair), longer))
    with pytest.raises(DataError, match=r"Sample 1 has the reward None, expected that of reward_func"):
        slime.post_process_rewards(slime_args(pair), [SlimeSample(reward={"teacher_log_probs": []}), SlimeSample()])


def test_slimes_reward_key_is_for_its_logs_and_hides_no_log_probs(pair: dict[str, str]) -> None:
    sample = SlimeSample(reward={"teacher_log_probs": [-1.0], "coverage": 1.0})
    slime.post_process_rewards(slime_args(pair, reward_key="coverage"), [sample])
    assert sample.teacher_log_probs.tolist() == [-1.0]


# ---- prime-rl ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("older", [False, True])
def test_prime_rl_gets_a_number_for_each_id_in_both_of_its_forms(pair: dict[str, str], older: bool) -> None:
    """`token_ids`, `mask`, `logprobs` (main, 2026-08), and `prompt_ids`, `completion_ids`, `completion_logprobs`."""
    ids = context()
    own = own_logps(len(ids) - LENGTH)
    if older:
        sample = SimpleNamespace(prompt_ids=ids[:LENGTH], completion_ids=ids[LENGTH:], completion_logprobs=own)
    else:
        mask = [False] * LENGTH + [True] * len(own)
        sample = SimpleNamespace(token_ids=ids, mask=mask, logprobs=[0.0] * LENGTH + own)

    async def run() -> list[list[float]]:
        scorer = connect(pair["student"], pair["teacher"], pair["url"])
        return await prime_rl.compute_teacher_logprobs(scorer, [sample, sample])

    result = asyncio.run(run())
    assert (
        len(result) == 2
        and result[0] == result[1]
        and len(result[0]) == len(ids)
        and result[0][:LENGTH] == [0.0] * LENGTH
    )
    sums_agree(result[0][LENGTH:], ids)


def test_a_sample_of_prime_rls_without_log_probs_is_refused_by_name(pair: dict[str, str]) -> None:
    ids = context()
    whole = SimpleNamespace(token_ids=ids, mask=None, logprobs=None)
    parts = SimpleNamespace(prompt_ids=ids[:LENGTH], completion_ids=ids[LENGTH:], completion_logprobs=None)

    async def run(sample: Any, credit: str) -> None:
        scorer = connect(pair["student"], pair["teacher"], pair["url"], credit=credit)
        await prime_rl.compute_teacher_logprobs(scorer, [sample])

    for sample in (whole, parts):
        for credit in ("gap", "shared"):
            with pytest.raises(DataError, match=f"{len(ids)} ids and student log-probs of shape"):
                asyncio.run(run(sample, credit))


# ---- tinker --------------------------------------------------------------------------------------------------------


class TensorData:
    """As `tinker.TensorData`: made of a tensor and read as one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def to_torch(self) -> torch.Tensor:
        return self.tensor


class TinkerClient:
    """As `tinker.SamplingClient`: log-probs of a whole input, none for its first token."""

    async def compute_logprobs_async(self, model_input: Any) -> list[float | None]:
        ids = torch.tensor(model_input)
        with torch.no_grad():
            rows = MODEL(ids[None]).logits[0].log_softmax(-1)
        return [None, *rows[:-1].gather(-1, ids[1:, None])[:, 0].tolist()]


def test_tinkers_advantages_get_the_difference_to_the_teacher_where_it_was_sampled() -> None:
    ids = context()
    own = torch.full((len(ids) - 1,), -torch.inf)  # a prompt has none, whatever stands there
    own[LENGTH - 1 :] = torch.tensor(own_logps(len(ids) - LENGTH))
    mask = torch.zeros(len(ids) - 1)
    mask[LENGTH - 1 :] = 1.0
    inputs = {
        "target_tokens": TensorData(torch.tensor(ids[1:])),
        "logprobs": TensorData(own),
        "mask": TensorData(mask),
        "advantages": TensorData(torch.ones(len(ids) - 1)),
    }
    datum = SimpleNamespace(model_input=SimpleNamespace(to_ints=lambda: ids[:-1]), loss_fn_inputs=inputs)
    teacher = tinker.TinkerTeacher(Projector(STUDENT, TEACHER), TinkerClient(), list)
    metrics = asyncio.run(tinker.incorporate_kl_penalty([datum], [teacher], TensorData, kl_penalty_coef=0.5))
    change = inputs["advantages"].to_torch() - 1.0
    right = sum(r for r in expected(ids, ASK, LENGTH) if r is not None) - float(own[LENGTH - 1 :].sum())
    assert (change[: LENGTH - 1] == 0).all() and float(change.sum()) == pytest.approx(0.5 * right, abs=1e-3)
    assert metrics["teacher_kl"] == pytest.approx(-right / (len(ids) - LENGTH), abs=1e-4)


# ---- TRL -----------------------------------------------------------------------------------------------------------


class NoTransfer:
    """Weights stay in this process, where the samples are made of them."""

    def init_weight_transfer(self) -> None: ...

    def pause(self) -> None: ...

    def send_weights(self, iterator: Iterator[Any]) -> None:
        for _ in iterator:
            pass

    def resume(self) -> None: ...

    def destroy(self) -> None: ...


def test_trls_asynchronous_trainer_trains_on_what_the_worker_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL 1.16.0's own code, with a tiny student and teacher; one sample a row, as eager attention knows no packing."""
    pytest.importorskip("trl.experimental.async_distillation", reason="needs TRL, which wants Python 3.11")
    from trl.experimental.async_distillation import AsyncDistillationConfig, AsyncDistillationTrainer

    from diglot.engines.plugins.trl import RolloutWorker

    # It asks the GPU for its name, for a metric.
    module = "trl.experimental.async_distillation.async_distillation_trainer"
    monkeypatch.setattr(f"{module}.get_peak_flops_per_device", lambda *_: 1e12)
    tokenizer, model = zoo.chatml(), tiny_model(zoo.chatml(), seed=1)
    model.save_pretrained(tmp_path / "student")
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Say {k}."}]} for k in range(8)])
    reply = STUDENT.encoder.encode(["one two three, as you asked."])[0].ids.tolist()

    async def sample(prompt: list[int]) -> list[int]:
        await asyncio.sleep(0)
        return [*reply[: 3 + len(prompt) % 5], STUDENT.stop_id]

    scorer = Scorer(Projector(STUDENT, TEACHER), LocalUpstream(MODEL))
    worker = RolloutWorker(rows, tokenizer, sample, scorer, teacher_top_k=4, together=2, queue_size=4)
    args = AsyncDistillationConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        teacher_top_k=4,
        token_budget=0,
        max_staleness=100,
        use_cpu=True,
        bf16=False,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        model_init_kwargs={"attn_implementation": "eager"},
    )
    trainer = AsyncDistillationTrainer(
        model=str(tmp_path / "student"),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        rollout_worker=worker,
        weight_transfer=NoTransfer(),
    )
    trainer.train()
    worker.stop()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 2 and len(losses) == 2 and all(0 < loss < 50 for loss in losses)
    before = dict(model.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_trls_server_trainer_trains_with_the_proxy_as_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL 1.16.0's own trainer and client; its student writes much that is no text, so not each step has a loss."""
    pytest.importorskip("trl.experimental.server_distillation", reason="needs TRL, which wants Python 3.11")
    from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer

    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda: True)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Say {k}."}]} for k in range(8)])
    one = made.proxy()
    with made.listening(one) as url:
        args = ServerDistillationConfig(
            output_dir=str(tmp_path),
            teacher_model_server_url=url,
            beta=0.0,
            loss_top_k=4,
            max_steps=2,
            per_device_train_batch_size=4,
            max_completion_length=8,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        model = tiny_model(zoo.chatml())
        trainer = ServerDistillationTrainer(model=model, args=args, train_dataset=rows, processing_class=zoo.chatml())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and max(losses) > 0 and all(loss >= 0 for loss in losses)
    assert b'status="200"} 2.0' in one.metrics.text()


def test_a_worker_for_trl_without_rows_is_refused() -> None:
    from diglot.engines.plugins.trl import RolloutWorker

    with pytest.raises(DataError, match="The dataset has no rows"):
        RolloutWorker([], None, None, None)  # type: ignore[arg-type]


def test_the_worker_for_trl_says_what_ended_it() -> None:
    pytest.importorskip("trl.experimental.async_distillation", reason="needs TRL, which wants Python 3.11")
    from diglot.engines.plugins.trl import RolloutWorker

    async def sample(prompt: list[int]) -> list[int]:
        raise OSError("the engine is gone")

    scorer = Scorer(Projector(STUDENT, TEACHER), LocalUpstream(MODEL))
    rows = [{"prompt": [{"role": "user", "content": "Hi"}]}]
    worker = RolloutWorker(rows, zoo.chatml(), sample, scorer, together=1)
    worker.start()
    worker._thread.join(20)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError) as error:
        worker.check_health(100.0)
    assert "the engine is gone" in str(error.value.__cause__)
    worker.stop()


# ---- verl ----------------------------------------------------------------------------------------------------------


class VerlManager:
    """As verl's `AsyncTeacherLLMServerManager` (main, 2026-09): row `t` is about id `t + 1`, the last about none."""

    shift = 1

    async def compute_teacher_logprobs_single(
        self, sequence_ids: list[int], multi_modal_data: Any = None, routing_key: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor(sequence_ids)
        with torch.no_grad():
            rows = MODEL(ids[None]).logits[0].log_softmax(-1)
        following = torch.cat([ids[self.shift :], ids[: self.shift]])
        return following[:, None].to(torch.int32), rows.gather(-1, following[:, None])


def verl_rows(ids: list[int], manager: type = VerlManager) -> tuple[torch.Tensor, torch.Tensor]:
    teacher = verl.cross_tokenizer(manager, Projector(STUDENT, TEACHER))()
    return asyncio.run(teacher.compute_teacher_logprobs_single(sequence_ids=ids, routing_key="math"))


def test_verl_gets_rows_about_the_following_id_and_not_a_number_where_nothing_is_known() -> None:
    ids = context()
    names, logps = verl_rows(ids)
    assert names.dtype == torch.int32 and names.shape == logps.shape == (len(ids), 1)
    assert names[:-1, 0].tolist() == ids[1:]
    right = [r for r in expected(ids, ASK, LENGTH) if r is not None]
    assert logps[LENGTH - 1 : -1, 0].tolist() == [pytest.approx(r, abs=2e-4) for r in right]
    assert logps[: LENGTH - 1].isnan().all() and logps[-1].isnan()


def test_verl_whose_rows_stand_elsewhere_is_refused() -> None:
    class Unshifted(VerlManager):
        shift = 0

    with pytest.raises(TeacherError, match="Row 0 of verl's teacher is about id"):
        verl_rows(context(), Unshifted)

    class Shorter(VerlManager):
        async def compute_teacher_logprobs_single(self, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
            ids, logps = await super().compute_teacher_logprobs_single(**more)
            return ids[:-2], logps[:-2]

    class Wider(VerlManager):
        async def compute_teacher_logprobs_single(self, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
            ids, logps = await super().compute_teacher_logprobs_single(**more)
            return ids, logps.expand(-1, 3)

    for manager in (Shorter, Wider):
        with pytest.raises(TeacherError, match=r"for a text of \d+ tokens, expected \[\d+, 1\] of both"):
            verl_rows(context(), manager)
    with pytest.raises(ConfigError, match="reads text alone"):
        teacher = verl.cross_tokenizer(VerlManager, Projector(STUDENT, TEACHER))()
        asyncio.run(teacher.compute_teacher_logprobs_single([1], multi_modal_data={"images": [1]}))


def test_the_loss_for_verl_is_the_difference_where_the_teacher_speaks_and_nothing_elsewhere() -> None:
    student = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
    teacher = torch.tensor([[[-0.5], [float("nan")], [-1.0]]])
    data = {"teacher_logprobs": teacher, "response_mask": torch.tensor([[1, 1, 0]])}
    loss = verl.make_loss(lambda value, data: value, float)
    losses, metrics = loss(None, None, {"log_probs": student}, data)
    losses.sum().backward()
    assert losses.tolist() == [[-0.5, 0.0, 0.5]] and student.grad is not None and student.grad.tolist() == [[1, 0, 1]]
    assert metrics == {"distillation/abs_loss": 0.25, "distillation/coverage": 0.5}


def test_a_micro_batch_of_verl_without_a_response_has_numbers_in_its_metrics() -> None:
    data = {"teacher_logprobs": torch.full((1, 2, 1), float("nan")), "response_mask": torch.zeros(1, 2)}
    loss = verl.make_loss(lambda value, data: value, float)
    assert loss(None, None, {"log_probs": torch.zeros(1, 2)}, data)[1] == {
        "distillation/abs_loss": 0.0,
        "distillation/coverage": 0.0,
    }
