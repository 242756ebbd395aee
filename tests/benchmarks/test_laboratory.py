"""The laboratory's distributions are exact, its cells resume, and its control learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import laboratory
import numpy as np
import pytest
import sums
import torch
import toys
from arms import Arm, Cells, code_digest, markdown, mean_of
from laboratory import Laboratory
from tasks import TASKS

from diglot.errors import StoppedError

SMALL = toys.Texts(length=3, prompts=("aa", "b"))


def small(pair: str) -> Laboratory:
    return Laboratory(pair, SMALL, fit_steps=60)


@pytest.mark.parametrize("pair", ["finer", "coarser", "overlapping"])
def test_every_path_of_the_trie_has_the_log_prob_of_a_plain_forward_pass(pair: str) -> None:
    """Prompts of one and of two tokens in one batch, so padding must not be seen."""
    reader = small(pair).reader
    model = toys.tiny_llama(reader.tokenizer, 3)
    with torch.no_grad():
        got = toys.path_log_probs(model, reader.prompts, reader.all)
        for row, prompt in zip(got, reader.prompts, strict=True):
            for log_prob, path in zip(row, reader.all.paths, strict=True):
                ids = [*prompt, *path, toys.STOP]
                every = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                plain = sum(every[at - 1, ids[at]] for at in range(len(prompt), len(ids)))
                assert abs(float(log_prob - plain)) < 1e-4


def test_the_distribution_counts_all_paths_of_a_text_and_what_is_longer() -> None:
    """A uniform model of the two-letter tokenizer: 13 ids, so a path of n tokens and stop has 13 ** -(n + 1)."""
    reader = small("coarser").reader
    model = toys.tiny_llama(reader.tokenizer, 0)
    torch.nn.init.zeros_(model.lm_head.weight)
    got, canonical = reader.distribution(model)
    strings = SMALL.strings
    one = 1 / 13
    assert got[0, strings.index("")] == pytest.approx(one)
    assert got[0, strings.index("ab")] == pytest.approx(one**2 + one**3)  # ab; a b
    assert got[1, strings.index("abc")] == pytest.approx(2 * one**3 + one**4)  # ab c; a bc; a b c
    assert got.sum(-1) == pytest.approx(1.0)
    assert canonical == pytest.approx(one + 3 * one**2 + 9 * one**2 + 27 * one**3)


def test_random_distributions_add_up_and_depend_on_the_last_letters_only() -> None:
    wanted = SMALL.random_distribution(0)
    assert wanted.sum(-1) == pytest.approx(1.0)
    longer = toys.Texts(length=5, prompts=("aa", "b")).random_distribution(0, memory=1)
    strings = toys.Texts(length=5).strings
    mass = dict(zip(strings, longer[0], strict=True))
    assert mass["ab"] / mass["cab"] == pytest.approx(mass["abb"] / mass["cabb"])


def test_a_perfect_student_knows_the_teachers_distribution_through_other_tokens() -> None:
    lab = Laboratory("finer", SMALL, fit_steps=80)
    _, other, _ = lab.student("other")
    model, perfect, canonical = lab.student("perfect")
    assert lab.divergences(perfect)["reverse_kl"] < 0.3 < 1.5 < lab.divergences(other)["reverse_kl"]
    assert canonical > 0.9
    assert np.array_equal(lab.reader.distribution(model)[0], perfect)


def test_fitted_models_are_kept_by_what_they_were_made_from(tmp_path: Path) -> None:
    wanted, tokenizer = SMALL.random_distribution(1), toys.bpe("a+b")
    first, distribution, canonical = toys.fitted(tokenizer, SMALL, wanted, 3, 0, tmp_path)
    again, same, mass = toys.fitted(tokenizer, SMALL, wanted, 3, 0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert np.array_equal(distribution, same) and canonical == mass
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    toys.fitted(tokenizer, SMALL, SMALL.random_distribution(2), 3, 0, tmp_path)
    toys.fitted(toys.bpe("b+a"), SMALL, wanted, 3, 0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_control_learns_and_cells_are_not_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, arms, run = small("equal"), [Arm.parse("jsd")], dict(steps=20, batch=16, rate=2e-3)
    cells = Cells(tmp_path, "code")
    (result,) = laboratory.measure(lab, arms, [0], ["other"], cells, **run)
    assert result["after"]["reverse_kl"] < 0.7 * result["before"]["reverse_kl"]
    assert "jsd" in laboratory.show([result]) and "→" in laboratory.show_means([result])

    def never(*_: Any, **__: Any) -> dict[str, Any]:
        raise AssertionError("ran again")

    monkeypatch.setattr(Laboratory, "run", never)
    assert laboratory.measure(lab, arms, [0], ["other"], cells, **run) == [result]
    (other,) = laboratory.measure(lab, arms, [0], ["other"], Cells(tmp_path, "changed"), **run)
    assert other["error"] == "AssertionError: ran again" and "AssertionError" in laboratory.show([other])
    assert laboratory.measure(lab, arms, [0], ["other"], Cells(tmp_path, "changed", any_code=True), **run) == [result]


def test_a_signal_ends_every_table_and_is_no_result_of_an_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> dict[str, Any]:
        raise StoppedError("Stopped by SIGTERM after step 3.", 143)

    monkeypatch.setattr(Laboratory, "run", stopped)
    monkeypatch.setattr(sums.Numbers, "run", stopped)
    bench = sums.Numbers("finer", TASKS["numbers"], width=16, layers=1, steps=1, student_steps=1)
    cells, arms = Cells(tmp_path, "code"), [Arm.parse("jsd")]
    with pytest.raises(StoppedError):
        laboratory.measure(small("equal"), arms, [0], ["other"], cells)
    with pytest.raises(StoppedError):
        sums.measure(bench, arms, ["on"], [0], cells)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("pair", ["finer", "coarser"])
def test_a_student_learns_from_a_teacher_that_cuts_text_differently(pair: str, tmp_path: Path) -> None:
    """By the distribution over whole texts, in nats per text, which no objective optimises as such."""
    run = dict(steps=20, batch=16, rate=2e-3)
    (result,) = laboratory.measure(small(pair), [Arm.parse("covering")], [0], ["other"], Cells(tmp_path, "code"), **run)
    assert result["after"]["reverse_kl"] < 0.7 * result["before"]["reverse_kl"]
    assert result["after"]["forward_kl"] < 0.7 * result["before"]["forward_kl"]


def test_unequal_tokenizers_are_trained_with_both_trainers(tmp_path: Path) -> None:
    arms = [Arm.parse("strict"), Arm.parse("minillm:num_iterations=1")]
    run = dict(steps=2, batch=4, rate=2e-3)
    results = laboratory.measure(small("finer"), arms, [0], ["perfect"], Cells(tmp_path, "code"), **run)
    assert ["error" in result for result in results] == [False, False]
    assert all(result["after"] != result["before"] for result in results)
    assert laboratory.measure(small("finer"), [Arm.parse("jsd")], [0], ["other"], Cells(tmp_path, "code"), **run) == []


def test_arms_are_read_from_their_names() -> None:
    assert Arm.parse("auto").options == {"objective": "auto"}
    arm = Arm.parse("strict:residual=true,top_k=0+alm:weight=1e-1@lmbda=0,beta=.5")
    assert arm.options["objective"] == [
        {"name": "strict", "residual": True, "top_k": 0},
        {"name": "alm", "weight": 0.1},
    ]
    assert (arm.minillm, arm.options["lmbda"], arm.options["beta"]) == (False, 0, 0.5)
    mixed = Arm.parse("minillm:gamma=1.0+bpm")
    assert mixed.minillm and mixed.options == {"gamma": 1.0, "objective": ["bpm"]}
    for wrong in ("", "strict:beta", "strict+"):
        with pytest.raises(ValueError, match=r"should be key=value|names no objective"):
            Arm.parse(wrong)


def test_tables_and_digests() -> None:
    assert mean_of([1.0, 2.0]) == "**1.50** (1.00, 2.00)" and mean_of([1.0]) == "1.00" and mean_of([]) == "-"
    assert markdown(["a", "b"], [["c", "d"]]).splitlines() == ["| a | b |", "| --- | ---: |", "| c | d |"]
    assert code_digest() != code_digest(Path(laboratory.__file__))
