"""The real pair: Gemma-3-270M teaches SmolLM2-135M, with their own weights, tokenizers and templates."""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assets import fetch_texts
from datasets import Dataset
from support.pairing import check_pair
from support.real_assets import model_folder, tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from diglot import GKDConfig, GKDTrainer, MiniLLMConfig, MiniLLMTrainer, Vocabulary
from diglot.comparisons import make_batch, scores_of
from diglot.data import Sample
from diglot.heads import Head, last_hidden
from diglot.rendering import Conversation, Renderer

pytestmark = pytest.mark.real

STUDENT, TEACHER = "smollm2-135m-instruct", "gemma-3-270m"


@lru_cache
def model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32).eval()


@lru_cache
def renderer(name: str) -> Renderer:
    return Renderer(tokenizer(name), name=name)


def test_w13_sentencepiece_teachers_are_aligned_by_bytes() -> None:
    """Encyclopedia passages: nearly every token of the byte-level student lies in an exact chunk."""
    texts = [row["text"][:600] for row in fetch_texts("passages", "heldout")[:50]]
    covered, tokens = check_pair(renderer("smollm2"), renderer("gemma3"), texts)
    assert covered / tokens > 0.99


def test_tables_of_262144_pieces_are_built_quickly_and_share_what_they_share() -> None:
    import time

    start = time.monotonic()
    table = Vocabulary.from_tokenizer(tokenizer("gemma3"), 262144)
    assert len(table) == 262144 and max(table.names) < 262144
    assert time.monotonic() - start < 10  # under a second on a quiet machine
    shared, _ = Vocabulary.from_tokenizer(tokenizer("smollm2")).shared(table)
    assert len(shared) > 40_000


@pytest.mark.parametrize("name", [STUDENT, TEACHER])
def test_the_head_gives_the_models_own_logits(name: str) -> None:
    ids = torch.tensor([[5, 100, 2000, 30, 40]])
    with torch.no_grad():
        own = model(name)(input_ids=ids).logits
        result = Head.of(model(name))(last_hidden(model(name), ids, torch.ones_like(ids)))
    assert torch.allclose(result, own, atol=1e-3)


def test_bits_per_byte_need_the_bos_that_the_tokenizer_adds() -> None:
    """Gemma reads a passage at one bit and a half per byte or less; without its BOS it is worse."""
    text = fetch_texts("passages", "heldout")[0]["text"][:500]
    r = Renderer(tokenizer("gemma3"), num_embeddings=262144, name="teacher")
    rendered = r.render(Conversation(None), text, stopped=False)
    assert rendered.ids[0] == r.tokenizer.bos_token_id
    losses = []
    for ids in (rendered.ids, rendered.ids[1:]):
        x = torch.from_numpy(ids)[None]
        with torch.no_grad():
            logp = model(TEACHER)(input_ids=x).logits[0, :-1].log_softmax(-1).gather(1, x[0, 1:, None])
        losses.append(-logp.sum().item() / math.log(2) / len(text.encode()))
    assert losses[0] < 1.6 and losses[1] > 1.05 * losses[0]


def trainer(kind: str, out: Path, **options: Any) -> Any:
    rows = [
        {"prompt": " ".join(row["text"].split(" ")[:12]), "completion": " " + " ".join(row["text"].split(" ")[12:40])}
        for row in fetch_texts("passages", "train")[:16]
    ]
    trainer_class, config = {"gkd": (GKDTrainer, GKDConfig), "minillm": (MiniLLMTrainer, MiniLLMConfig)}[kind]
    common = dict(
        output_dir=str(out), max_steps=2, per_device_train_batch_size=4, max_completion_length=16, logging_steps=1,
        learning_rate=5e-5, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return trainer_class(
        copy.deepcopy(model(STUDENT)), model(TEACHER), config(**{**common, **options}),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer("smollm2"),
        teacher_processing_class=tokenizer("gemma3"),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["gkd", "minillm"])
def test_s13_s15_a_real_pair_trains(kind: str, tmp_path: Path) -> None:
    made = trainer(kind, tmp_path)
    made.train()
    log = made.state.log_history[0]
    assert math.isfinite(log["loss"]) and log["align/coverage"] > 0.95 and log["align/one_to_one"] > 0.7
    made.save_model(str(tmp_path / "student"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), made.model.parameters(), strict=True))


def test_the_teacher_likes_its_own_language_and_a_wrong_tokenizer_would_show(tmp_path: Path) -> None:
    """The signal: per byte the teacher is little surprised by real text; fed the student's ids it reads noise (W9)."""
    made = trainer("gkd", tmp_path)
    text = fetch_texts("passages", "heldout")[1]["text"][:400]
    (compared,) = made.comparisons
    pair = compared.reader.written(Sample(Conversation(None, text[:80]), text[80:], "held-out"))
    made_of_one = make_batch([compared], [(pair,)], [0], on_policy=False)
    view, batch = made_of_one.views[0], made_of_one.views[0].read
    scored = len(text[80:].encode())
    hidden = made.hidden_at_rows(made.model, batch.student)
    logp_t = scores_of(made_of_one, view, hidden, made.student_head).teacher_text(1.0)
    right = -logp_t[~batch.teacher.stop].sum() / scored
    ids = torch.from_numpy(np.minimum(batch.pairs[0].student.ids, 262143))[None]
    with torch.no_grad():
        logp = compared.teacher.model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    wrong = -logp[batch.student.rows].sum() / scored
    assert right < 1.0 < 2 * right < wrong


def test_code_keeps_its_indentation_in_an_exact_alignment() -> None:
    """Runs of spaces are single pieces of Gemma's and several tokens of others: still the same bytes."""
    code = "def f(x):\n    if x:\n            return x\n\treturn 0\n"
    covered, tokens = check_pair(renderer("smollm2"), renderer("gemma3"), [code])
    assert covered == tokens
