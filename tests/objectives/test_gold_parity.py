"""ULD and GOLD against TRL 1.16.0's own loss on the same logits of real tokenizers."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import support.tokenizers_zoo as zoo
import torch
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from diglot.batches import AlignedBatch, PackedSide, PairReader, align_pairs
from diglot.data import to_sample
from diglot.objectives import Pair, Path, RowObjective, make_objective
from diglot.rendering import Renderer

if sys.version_info < (3, 11):
    pytest.skip("TRL 1.16.0 needs Python 3.11", allow_module_level=True)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.gold.gold_config import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.experimental.utils import encode_with_byte_offsets, pad_byte_offsets

TEXTS = [
    "The river had been rising since dawn, naïve 数学!",
    "Say hello, größe 🚀 beenen tolden",
    "def add(a, b): return a + 12",
]
BETAS = [0.0, 0.3, 0.5, 1.0]


@lru_cache
def same_stop() -> PreTrainedTokenizerFast:
    """Knows English only, and spells its stop token as `chatml` does, so that TRL holds the two to be the same."""
    special = ["<unk>", "<s>", "<|im_end|>"]
    backend = zoo._byte_level(300, special)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(zoo.CORPUS[:2] * 4, trainer)
    return zoo._wrap(backend, zoo.INST, bos_token="<s>", eos_token="<|im_end|>", pad_token="<unk>")


TEACHERS = {"inst": zoo.inst, "same_stop": same_stop}


class Case:
    """A batch of texts as both sides read them, with random logits that like what was written."""

    def __init__(self, teacher: str, texts: list[str]) -> None:
        self.texts, self.tokenizers = texts, (zoo.chatml(), TEACHERS[teacher]())
        sides = tuple(Renderer(tokenizer, name="side") for tokenizer in self.tokenizers)
        reader = PairReader(*sides, same_vocabulary=False)
        read = [reader.written(to_sample({"prompt": "Say:", "completion": text}, "row")) for text in texts]
        self.batch: AlignedBatch = align_pairs(read, pad_s=sides[0].stop_id, pad_t=sides[1].stop_id, on_policy=False)
        self.written = self.batch.written
        vocabularies = [side.vocabulary for side in sides]
        self.pair = Pair.of(*vocabularies, [sides[0].stop_id], [sides[1].stop_id])
        self.logits_s = logits(self.batch.student, len(vocabularies[0]), 0).requires_grad_()
        self.logits_t = logits(self.batch.teacher, len(vocabularies[1]), 1)

    @cached_property
    def flat(self) -> tuple[Tensor, Tensor]:
        """The rows that predict the scored tokens, `[N_s, V_s]` and `[N_t, V_t]`."""
        both = (self.logits_s, self.batch.student), (self.logits_t, self.batch.teacher)
        flat = [x.flatten(0, 1)[side.rows] for x, side in both]
        return flat[0], flat[1]

    def trl(self, **options: Any) -> Tensor:
        """TRL's own loss; all options but these have its defaults."""
        names = [f for f in fields(GOLDConfig) if "uld" in f.name or f.name == "beta"]
        config = SimpleNamespace(**{**{f.name: f.default for f in names}, **options})
        side_s, side_t = self.batch.student, self.batch.teacher
        return ULDLoss(config, *self.tokenizers)(
            self.logits_s,
            self.logits_t,
            labels(side_s),
            labels(side_t),
            side_s.input_ids,
            side_t.input_ids,
            self.offsets(0, side_s),
            self.offsets(1, side_t),
        )

    def offsets(self, which: int, side: PackedSide) -> Tensor:
        """Byte offsets as TRL finds them, stop at the end of the text, zero for the prompt."""
        encoded = encode_with_byte_offsets(self.tokenizers[which].backend_tokenizer, self.texts)
        rows = []
        for (ids, offsets), own, text in zip(encoded, labels(side), self.texts, strict=True):
            scored = (own >= 0).nonzero().squeeze(-1).tolist()
            assert side.input_ids[len(rows), scored].tolist()[:-1] == ids  # both cut the text alike
            length = len(text.encode())
            whole = [(0, 0)] * scored[0] + [tuple(o) for o in offsets] + [(length, length)]
            rows.append(pad_byte_offsets(whole, side.input_ids.shape[1], padding_side="right"))
        return torch.stack(rows)

    def ours(self, objective: RowObjective) -> Tensor:
        """The objective's values, reduced as TRL reduces: over the rows of a text, then over texts."""
        rows = objective.rows(self.written)
        teller = Teller(*self.flat, self.written)
        extra = objective.extra(rows, self.written, teller)
        loss = objective(self.flat[0][rows.student], self.flat[1][rows.teacher], **rows.inputs, **extra).loss
        segment = torch.from_numpy(self.written.student.segment)[rows.student]
        return torch.stack([loss[segment == k].mean() for k in range(len(self.texts))]).mean()


def logits(side: PackedSide, size: int, seed: int) -> Tensor:
    """Random, and larger for the written token in the row that predicts it and in the row after."""
    made = 0.5 * torch.randn(*side.input_ids.shape, size, generator=torch.Generator().manual_seed(seed))
    flat = made.flatten(0, 1)
    for shift in (0, 1):
        flat[side.rows + shift, side.targets] += 5
    return made


def labels(side: PackedSide) -> Tensor:
    labels = torch.full_like(side.input_ids, -100).flatten()
    labels[side.rows + 1] = side.targets
    return labels.view_as(side.input_ids)


@dataclass
class Teller:
    """Answers from whole logits of the scored tokens."""

    logits_s: Tensor
    logits_t: Tensor
    written: Any

    @property
    def path(self) -> Path:
        both = (self.logits_s, self.written.student), (self.logits_t, self.written.teacher)
        return Path(*(x.log_softmax(-1)[range(len(w.ids)), w.ids] for x, w in both))

    def student_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        return self.logits_s.log_softmax(-1)[token, ids]

    def teacher_logps(self, token: Tensor, ids: Tensor) -> Tensor:
        return self.logits_t.log_softmax(-1)[token, ids]

    def teacher_ranges(self, token: Tensor, low: Tensor, high: Tensor) -> Tensor:
        raise NotImplementedError


CASES = {name: Case(name, TEXTS) for name in TEACHERS}


def assert_equal(case: Case, ours: Tensor, trl: Tensor) -> None:
    """The values and the gradients with respect to the student's logits."""
    assert ours.item() == pytest.approx(trl.item(), abs=1e-5)
    (one,) = torch.autograd.grad(ours, case.logits_s, retain_graph=True)
    (other,) = torch.autograd.grad(trl, case.logits_s)
    assert other.abs().max() > 1e-4
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_the_texts_have_chunks_of_one_and_of_several_tokens_on_either_side() -> None:
    """Otherwise what follows would prove little."""
    alignment = CASES["same_stop"].written.alignment
    for one, other in ((alignment.count_s, alignment.count_t), (alignment.count_t, alignment.count_s)):
        assert ((one > 1) & (other == 1)).sum() > 3
    assert ((alignment.count_s == 1) & (alignment.count_t == 1)).sum() > 9
    assert ((alignment.count_s > 1) & (alignment.count_t > 1)).any()


def test_uld_by_index_is_trls_positional_loss_read_at_the_right_row() -> None:
    case = CASES["same_stop"]
    trl = case.trl(
        use_extended_uld=False,
        uld_token_merge_strategy="bayesian",
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
    )
    assert_equal(case, case.ours(make_objective("uld", case.pair, rows="index")), trl)


def test_uld_on_pairs_is_trls_aligned_loss_where_all_chunks_are_pairs() -> None:
    case = Case("inst", ["aa bb!", "(x) = 9"])
    assert case.batch.stats["one_to_one"] == case.batch.stats["tokens"] > 8
    trl = case.trl(uld_token_merge_strategy="bayesian", uld_skip_student_eos=False, uld_skip_teacher_eos=False)
    assert_equal(case, case.ours(make_objective("uld", case.pair)), trl)


@pytest.mark.parametrize("weights", ["mass", "count"])
@pytest.mark.parametrize("beta", BETAS)
def test_gold_is_trls_hybrid_loss_in_its_bayesian_reading(beta: float, weights: str) -> None:
    """TRL is told to compare stop too; weights of one are what we call mass."""
    case = CASES["same_stop"]
    fixed = dict(uld_hybrid_matched_weight=1.0, uld_hybrid_unmatched_weight=1.0) if weights == "mass" else {}
    trl = case.trl(
        uld_use_hybrid_loss=True,
        uld_token_merge_strategy="bayesian",
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        beta=beta,
        **fixed,
    )
    assert_equal(case, case.ours(make_objective("gold", case.pair, beta=beta, weights=weights)), trl)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("beta", BETAS)
def test_gold_as_shipped_is_trls_hybrid_loss_by_default(beta: float, teacher: str) -> None:
    case = CASES[teacher]
    trl = case.trl(uld_use_hybrid_loss=True, beta=beta)
    assert_equal(case, case.ours(make_objective("gold", case.pair, beta=beta, gold_as_shipped=True)), trl)


def test_what_trl_ships_is_another_number_than_the_right_reading() -> None:
    case = CASES["same_stop"]
    right = case.ours(make_objective("gold", case.pair, weights="count")).item()
    shipped = case.ours(make_objective("gold", case.pair, gold_as_shipped=True)).item()
    assert abs(shipped - right) > 1e-3


def test_parity_breaks_if_a_row_is_read_one_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness sees the fault that it is there to see."""
    case = CASES["same_stop"]
    objective = make_objective("gold", case.pair, gold_as_shipped=True)
    right = case.ours(objective).item()
    rows = objective.rows(case.written)
    moved = type(rows)(rows.student - 1, rows.teacher - 1)
    monkeypatch.setattr(objective, "rows", lambda written: moved)
    assert abs(case.ours(objective).item() - right) > 1e-4
