"""Runs what a declaration names, one JSON file per cell, so that what was killed goes on where it was.

For each pair: head-room first (a pair without is refused, and nothing is trained on it). For each arm: a run for each
learning rate, measured on the validation split; then one run for each seed with the best rate, measured on the test
split. Cells are named by everything that they depend on, the code included.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import Arm, Cells, code_digest
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

from diglot.errors import StoppedError

from . import paired
from .bench import Bench, open_bench
from .declaration import Declaration, DeclarationError, PairDeclaration
from .measures import KINDS, as_json

Cell = dict[str, Any]
BENCHMARKS = Path(__file__).resolve().parents[1]
_OPEN: dict[str, Bench] = {}
NOT_RESULTS = ("table.py", "plots.py", "paired.py", "__main__.py", "__init__.py", "runner.py", "declaration.py")


class MissingCellError(RuntimeError):
    """A cell that was not run yet, where nothing may be run."""


def _code() -> str:
    here = [path for path in Path(__file__).parent.glob("*.py") if path.name not in NOT_RESULTS]
    shared = [BENCHMARKS / name for name in ("arms.py", "laboratory.py", "sums.py", "toys.py")]
    return code_digest(*sorted(here), *shared)


CODE = _code()  # as it was imported: a file that is edited during a run is not what made its cells


def cells_in(folder: Path, any_code: bool = False) -> Cells:
    """The cells of a folder, named by all code that makes them."""
    return Cells(folder / "cells", CODE, any_code)


@dataclass(frozen=True)
class Plan:
    """How the cells of one declaration are had: run, or only read."""

    declaration: Declaration
    folder: Path
    any_code: bool = False
    read_only: bool = False

    def pair_setting(self, pair: PairDeclaration) -> Cell:
        """What every cell of a pair depends on; arms, rates and the bound on head-room are no part of it."""
        budget = asdict(pair.budget)
        return {"pair": pair.name, "kind": pair.kind, "options": pair.options, "budget": budget}

    def cell(self, setting: Cell, run: Callable[[], Cell]) -> Cell:
        """The cell, from disk, or from `run` if it may be run."""

        def missing() -> Cell:
            raise MissingCellError(f"not run yet: {json.dumps(setting)}")

        return cells_in(self.folder, self.any_code).result(setting, missing if self.read_only else run)

    def bench(self, pair: PairDeclaration) -> Bench:
        """The pair's models and data, opened once in each process."""
        key = json.dumps([self.pair_setting(pair), str(self.folder)])
        if key not in _OPEN:
            _OPEN.clear()  # one pair's models at a time
            _OPEN[key] = open_bench(pair, self.folder)
        return _OPEN[key]

    def headroom(self, pair: PairDeclaration) -> Cell:
        """The student before training and the teacher, on the test split."""

        def run() -> Cell:
            bench = self.bench(pair)
            return {
                "before": as_json(bench.measure(bench.student(), "test")),
                "teacher": as_json(bench.measure_teacher("test")),
            }

        return self.cell({"stage": "headroom", **self.pair_setting(pair)}, run)

    def run(self, pair: PairDeclaration, label: str, rate: float, seed: int, stage: str) -> Cell:
        """One student: `stage` is "selection", measured on validation, or "test"."""

        def train() -> Cell:
            from .training import train

            bench = self.bench(pair)
            trained = train(bench, Arm.parse(label), pair.budget, rate, seed)
            split = "test" if stage == "test" else "validation"
            return {"after": as_json(bench.measure(trained.model, split)), **trained.facts}

        setting = {"stage": stage, **self.pair_setting(pair), "arm": label, "rate": rate, "seed": seed}
        return self.cell(setting, train)

    def rate(self, pair: PairDeclaration, label: str) -> float:
        """The rate with the best validation measure, the smaller one if two are equal.

        Raises:
            ArmError: no rate ends with a finite value.
        """
        name, seed = self.declaration.selection_by, self.declaration.selection_seed
        sign = 1 if KINDS[name].better == "lower" else -1
        values: list[tuple[float, float]] = []
        for rate in pair.rates:
            after = self.run(pair, label, rate, seed, "selection")["after"]
            if name in after and math.isfinite(after[name]["value"]):
                values.append((sign * after[name]["value"], rate))
        if not values:
            raise ArmError(f"no rate of {list(pair.rates)} ends with a finite {KINDS[name].title} on {pair.name}")
        return min(values)[1]


class ArmError(RuntimeError):
    """An arm that cannot be judged on a pair."""


def no_headroom(cell: Cell, least: float) -> str | None:
    """Why nothing can be learnt on a pair, if so: the student is no further than `least` from the teacher, or the
    teacher is no better than the student at anything that both were measured at, beyond the noise over items."""
    kl = paired.interval(_one_seed(cell["before"]["reverse_kl"]))
    unit = cell["before"]["reverse_kl"]["unit"]
    if not kl.low > least:
        return (
            f"the student is {kl.value:.3f} ({kl.low:.3f} to {kl.high:.3f}) {unit} from the teacher; needed: {least:g}"
        )
    shown = []
    for name, of_teacher in cell["teacher"].items():
        sign = 1 if KINDS[name].better == "higher" else -1
        teacher, student = _one_seed(of_teacher), _one_seed(cell["before"][name])
        ahead = paired.difference(teacher, student)
        if min(sign * ahead.low, sign * ahead.high) > 0:
            return None
        shown.append(f"{KINDS[name].title} {teacher.value:.3f} against {student.value:.3f}")
    return f"the teacher is not better than the student: {', '.join(shown)}"


def _one_seed(measure: Cell) -> paired.Sums:
    return sums_of([measure])


def sums_of(measures: Sequence[Cell]) -> paired.Sums:
    """A measure of several cells, one for each seed."""
    top, bottom = ([measure[side] for measure in measures] for side in ("top", "bottom"))
    return paired.Sums(np.array(top, dtype=float), np.array(bottom, dtype=float))


@dataclass(frozen=True)
class ArmResult:
    """One arm on one pair: its rate and a cell for each seed, or why there is none."""

    pair: str
    arm: str
    rate: float | None
    cells: tuple[Cell, ...]
    error: str | None = None


def run_arm(plan: Plan, pair: PairDeclaration, name: str) -> ArmResult:
    """Choose the rate, then run the seeds. What fails is shown in the arm's place and ends no table."""
    label, rate = plan.declaration.arms[name], None
    quiet()
    try:
        rate = plan.rate(pair, label)
        cells = tuple(plan.run(pair, label, rate, seed, "test") for seed in plan.declaration.seeds)
    except MissingCellError:
        return ArmResult(pair.name, name, rate, (), "not run")
    except StoppedError:  # by a signal, which is meant for the whole table
        raise
    except Exception as error:
        return ArmResult(pair.name, name, rate, (), f"{type(error).__name__}: {error}")
    return ArmResult(pair.name, name, rate, cells)


@dataclass(frozen=True)
class PairResult:
    """All of one pair. `refused` says why nothing was trained on it."""

    pair: PairDeclaration
    headroom: Cell | None
    refused: str | None
    arms: tuple[ArmResult, ...] = ()


def run_all(plan: Plan, workers: int = 1, say: Callable[[str], None] = lambda text: None) -> list[PairResult]:
    """Everything that the declaration names; `workers` processes share the arms.

    Raises:
        DeclarationError: a pair's options cannot be run. What else fails is shown in its place.
    """
    heads = [(pair, *_headroom(plan, pair)) for pair in plan.declaration.pairs.values()]
    for pair, _, refused in heads:
        say(f"{pair.name}: {refused or 'has head-room'}")
    jobs = [(pair, name) for pair, _, refused in heads if not refused for name in pair.arms]
    arms: dict[tuple[str, str], ArmResult] = {}
    for result in _results(plan, jobs, workers):
        arms[result.pair, result.arm] = result
        say(f"{result.pair} {result.arm}: {result.error or _line(result)}")
    return [
        PairResult(pair, head, refused, tuple(arms[pair.name, name] for name in pair.arms if not refused))
        for pair, head, refused in heads
    ]


def _headroom(plan: Plan, pair: PairDeclaration) -> tuple[Cell | None, str | None]:
    try:
        cell = plan.headroom(pair)
    except MissingCellError:
        return None, "Not run"
    except (DeclarationError, StoppedError):
        raise
    except Exception as error:
        return None, f"Could not be measured: {type(error).__name__}: {error}"
    missing = no_headroom(cell, pair.headroom)
    return cell, missing and f"Refused: {missing}"


def _results(plan: Plan, jobs: Sequence[tuple[PairDeclaration, str]], workers: int) -> Iterator[ArmResult]:
    if workers == 1:
        yield from (run_arm(plan, pair, name) for pair, name in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run_arm, plan, pair, name) for pair, name in jobs]):
            yield done.result()


def _line(result: ArmResult) -> str:
    kl = sums_of([cell["after"]["reverse_kl"] for cell in result.cells])
    each = ", ".join(f"{value:.3f}" for value in kl.each)
    return f"rate {result.rate:g}, reverse KL {each} {result.cells[0]['after']['reverse_kl']['unit']}"


def quiet() -> None:
    """What trainers print is not for this terminal; one thread a process, so that workers do not fight."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


def progress(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)
