"""The benchmark of sums measures what it says, and refuses a teacher that does not know them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import sums
import torch
from arms import Arm, Cells
from sums import Numbers
from tasks import TASKS, Sums, Task, cut_unlike, made_tokenizer, real_tokenizer, texts_of

TASK = Sums((68, 72), (30, 33))


def untaught(direction: str = "finer") -> Numbers:
    return Numbers(direction, TASK, width=16, layers=1, steps=1, student_steps=1)


def test_one_tokenizer_reads_numbers_whole_and_the_other_digit_by_digit() -> None:
    student, teacher = untaught().tokenizers
    assert student.tokenize(" 70 plus 32 is 102.") == ["Ġ", "7", "0", "Ġplus", "Ġ", "3", "2", "Ġis", "Ġ", *"102", "."]
    assert teacher.tokenize(" 70 plus 32 is 102.") == ["Ġ", "70", "Ġplus", "Ġ", "32", "Ġis", "Ġ", "102", "."]
    assert [len(tokenizer) for tokenizer in untaught("coarser").tokenizers] == [len(teacher), len(student)]


def test_held_out_sums_are_in_no_training_prompt_and_wrong_sums_are_near() -> None:
    task = Sums()
    train, held = (task.rows(0, 500, part) for part in ("train", "held"))
    assert not {text for _, text in train} & {text for _, text in held}
    for prompt, text in task.rows(1, 200, "all", right=False):
        a, b = (int(word.strip(":")) for word in prompt.split() if word.strip(":").isdigit())
        first, second, total = (int(word.strip(".")) for word in text.split() if word.strip(".").isdigit())
        assert (first, second) == (a, b) and abs(total - a - b) <= task.off_by


def test_log_probs_of_texts_do_not_depend_on_their_batch() -> None:
    bench = untaught()
    tokenizer = bench.tokenizers[0]
    model = sums.llama(tokenizer, 16, 1, 0)
    prompts, texts = zip(*TASK.rows(0, 3, "all"), strict=True)
    read = [sums.ids_of(tokenizer, prompt) for prompt in prompts]
    rest = [sums.ids_of(tokenizer, text)[: 4 + i] for i, text in enumerate(texts)]
    with torch.no_grad():
        together = sums.written_log_probs(model, read, rest)
        for got, prompt, text in zip(together, read, rest, strict=True):
            every = model(torch.tensor([prompt + text])).logits[0].log_softmax(-1)
            plain = sum(every[len(prompt) + i - 1, token] for i, token in enumerate(text))
            assert abs(float(got - plain)) < 1e-4


def test_uniform_models_have_known_bits_and_know_no_sum() -> None:
    tokenizer, rows = untaught().tokenizers[0], TASK.rows(0, 8, "all")
    model = sums.llama(tokenizer, 16, 1, 0)
    torch.nn.init.zeros_(model.lm_head.weight)  # tied: the embedding with it
    tokens = sum(len(sums.ids_of(tokenizer, text)) + 1 for _, text in rows)
    size = sum(len(text) for _, text in rows)
    assert sums.bits_per_byte(model, tokenizer, rows) == pytest.approx(math.log2(len(tokenizer)) * tokens / size, 1e-4)
    assert sums.accuracy(model, tokenizer, rows) == 0.0


def test_divergence_is_the_log_ratio_of_what_was_written_and_cut_texts_have_no_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = untaught().tokenizers
    models = [sums.llama(tokenizer, 16, 1, seed) for seed, tokenizer in enumerate((student, teacher))]
    (prompt, text), (second, cut) = TASK.rows(0, 2, "all")
    cut = cut[:9]
    texts = [[*sums.ids_of(student, text), sums.STOP], sums.ids_of(student, cut)]
    monkeypatch.setattr(sums, "write", lambda *_, **__: texts)
    got = sums.divergence(*models, (student, teacher), [prompt, second])
    read = [[*sums.ids_of(teacher, text), sums.STOP], sums.ids_of(teacher, cut)]
    with torch.no_grad():
        own, other = (
            sums.written_log_probs(model, [sums.ids_of(tokenizer, p) for p in (prompt, second)], rest).sum()
            for model, tokenizer, rest in zip(models, (student, teacher), (texts, read), strict=True)
        )
    assert got["reverse_kl"] == pytest.approx(float(own - other) / (len(text) + len(cut)))
    assert (got["stopped"], got["samples"]) == (0.5, [text, cut])
    itself = sums.divergence(models[0], models[0], (student, student), [prompt, second])
    assert itself["reverse_kl"] == pytest.approx(0.0, abs=1e-5)


def test_what_is_written_ends_with_its_first_stop() -> None:
    tokenizer = untaught().tokenizers[0]
    model = sums.llama(tokenizer, 16, 1, 0)
    torch.manual_seed(0)
    completions = sums.write(model, tokenizer, ["70 pears and 32:", "7:"] * 40, sample=True)
    assert len(completions) == 80 and any(ids[-1] == sums.STOP for ids in completions)
    assert all(sums.STOP not in ids[:-1] and len(ids) <= sums.LONGEST for ids in completions)


def test_no_distillation_from_a_teacher_that_has_not_learnt_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = untaught()
    with pytest.raises(sums.NotLearntError, match="must be more than 95 %"):
        bench.teacher(control=False)
    run = dict(steps=1, batch=2, rate=1e-3, count=2)
    with pytest.raises(sums.NotLearntError):
        sums.measure(bench, [Arm.parse("strict")], ["on"], [0], Cells(tmp_path, "code"), **run)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sums, "Numbers", lambda *_, **__: bench)
    assert sums.main(["strict", "--out", str(tmp_path)]) == 1
    assert "held-out numbers" in capsys.readouterr().err


def test_cells_are_run_with_both_policies_and_the_control_with_the_students_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, requests = untaught(), []

    def teacher(self: Numbers, control: bool) -> tuple[Any, Any]:
        requests.append(control)
        tokenizer = self.tokenizers[0 if control else 1]
        return sums.llama(tokenizer, 16, 1, 0), tokenizer

    monkeypatch.setattr(Numbers, "teacher", teacher)
    run = dict(steps=2, batch=2, rate=1e-3, count=2)
    arms = [Arm.parse(label) for label in ("strict", "jsd", "minillm:num_iterations=1")]
    results = sums.measure(bench, arms, ["on", "off"], [0], Cells(tmp_path, "code"), **run)
    assert [(r["arm"], r["policy"], r.get("error")) for r in results] == [
        ("strict", "on", None),
        ("strict", "off", None),
        ("jsd", "on", None),
        ("jsd", "off", None),
        ("minillm:num_iterations=1", "on", None),
    ]
    assert requests == [False, False, True, True, False]
    assert all(r["after"]["bits_per_byte"] != r["before"]["bits_per_byte"] for r in results)
    shown = sums.show(results)
    assert "numbers, finer, `strict`, off-policy" in shown and "before, equal tokenizers" in shown
    assert sums.measure(bench, arms[:1], ["on"], [0], Cells(tmp_path, "code"), **run) == results[:1]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_has_right_and_wrong_sentences_and_holds_pairs_out(task: Task) -> None:
    train, held = (task.rows(0, 400, part) for part in ("train", "held"))
    assert not {text for _, text in train} & {text for _, text in held}
    right = dict(task.rows(1, 400, "all"))
    wrong = [text != right[prompt] for prompt, text in task.rows(2, 400, "all", right=False) if prompt in right]
    assert 0.5 < sum(wrong) / len(wrong) < 1


def test_a_tokenizer_without_what_no_text_can_contain_cuts_as_the_whole_one(tmp_path: Path) -> None:
    whole = made_tokenizer(TASK, whole=True)
    whole.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    small = Sums((68, 69), (30, 31), things=("books",))
    made = real_tokenizer(small, tmp_path)
    assert len(made) < len(whole) and made.decode([sums.STOP]) == "<stop>"
    for text in texts_of(small, 20):
        assert made.tokenize(text) == whole.tokenize(text)
    assert made.decode(sums.ids_of(made, "anything else, ß")) == "anything else, ß"


def test_the_share_of_bytes_that_are_cut_unlike_is_counted_in_bytes() -> None:
    pair = [made_tokenizer(TASK, whole) for whole in (False, True)]
    assert cut_unlike(pair, ["70 plus 102"]) == 5 / 11
    assert cut_unlike(pair[:1] * 2, ["70 plus 102"]) == 0.0
