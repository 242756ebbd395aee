"""Coverage: what is counted of what was written, and which windows stop a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.tokenizers_zoo as zoo
from support import tiny

from diglot.comparisons import Batch
from diglot.errors import AlignmentError
from diglot.trainers import GKDTrainer

STEP = "tokens that were written in step 0"
NOTHING = "none of the 12 tokens that were written is scored"


def written(out: Path, ids: Any, **options: Any) -> tuple[GKDTrainer, list[Batch]]:
    """The batches of a window in which the student wrote the same ids for each of four prompts."""
    trainer = tiny.gkd(out, zoo.chatml(), zoo.inst(), lmbda=1.0, **options)
    own = ids(trainer.student_renderer)
    trainer.sample = lambda conversations, prompts, seeds: [np.array(own)] * len(prompts)  # type: ignore[method-assign]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    window = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)[0]
    return trainer, [one["batch"] for one in window]


def broken(renderer: Any) -> list[int]:
    """Bytes that continue a character which nothing began."""
    table = renderer.vocabulary
    return [next(i for i in range(len(table)) if not table.control[i] and table.token(i) == b"\xa9")] * 3


def broken_to_the_end(renderer: Any) -> list[int]:
    return [*broken(renderer), renderer.stop_id]


def controls(renderer: Any) -> list[int]:
    """One letter behind names of speakers."""
    start = renderer.tokenizer.convert_tokens_to_ids("<|im_start|>")
    return [start, start, *renderer.encoder.encode(["a"])[0].ids.tolist()]


def reasoning(renderer: Any) -> list[int]:
    return renderer.encoder.encode(["<think>\nSo"])[0].ids.tolist()


@pytest.mark.parametrize("ids", [broken, controls])
def test_a_window_of_which_too_little_is_text_stops_the_run(
    ids: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(AlignmentError, match=STEP):
        written(tmp_path, ids)
    with caplog.at_level(logging.WARNING):
        trainer, (batch,) = written(tmp_path, ids, min_coverage=0.0)
    assert (NOTHING in caplog.text) == (ids is broken)
    shares = trainer.metrics.take(dict)
    assert shares["completions/scored"] == batch.scored / 12 == (0 if ids is broken else 1 / 3)


@pytest.mark.parametrize(("ids", "cut"), [(broken, 1.0), (broken_to_the_end, 0.0)])
def test_a_reply_that_its_writer_ended_is_not_counted_as_cut_though_its_stop_cannot_be_compared(
    ids: Any, cut: float, tmp_path: Path
) -> None:
    trainer, (batch,) = written(tmp_path, ids, min_coverage=0.0)
    assert trainer.metrics.take(dict)["completions/clipped_ratio"] == cut
    assert not batch.scored and not any(pair.student.stopped[-1] for pair in batch.pairs)


def test_roles_that_the_user_leaves_out_do_not_stop_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer, (batch,) = written(tmp_path, reasoning, score_reasoning=False)
    assert batch.scored == 0 and "tokens that were written is scored" in caplog.text
    assert trainer.metrics.take(dict)["completions/scored"] == 0
    loss = trainer.compute_loss(trainer.model, {"batch": batch})
    assert loss.item() == 0
    _, (batch,) = written(tmp_path, reasoning)
    assert batch.scored > 0


def whole_word(renderer: Any) -> list[int]:
    """One token of several bytes, which a teacher that has letters only cuts in each of them."""
    return [
        max(
            range(len(renderer.vocabulary)),
            key=lambda i: 0 if renderer.vocabulary.control[i] else renderer.vocabulary.lengths[i],
        )
    ]


@pytest.mark.parametrize("objective", ["strict", "covering"])
def test_a_step_in_which_nothing_can_be_compared_says_so(
    objective: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All that is written is aligned and scored, but no token is one to one."""
    trainer, (batch,) = written(tmp_path, whole_word, objective=objective)
    nothing = "Step 0: strict finds nothing to compare in the 4 tokens that are scored" in caplog.text
    assert nothing == (objective == "strict")
    assert trainer.metrics.take(dict)["align/coverage"] == 1.0
    assert (trainer.compute_loss(trainer.model, {"batch": batch}).item() == 0) == nothing
