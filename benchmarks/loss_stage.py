"""The loss stage against TRL's GOLD: from hidden states to their gradient and that of the student's head.

Each side runs in a process of its own, so that its peak memory is its own; the processes take turns. TRL's side makes
whole logits `[B, T, V]` of both models from the hidden states, as its trainer does, and hands them to its `ULDLoss`.
Our side aligns the texts and asks the objective for the loss. Both take the gradient of the same leaf `[B, T, H]` and
of the head's weight.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from cases import Case, TRLSide, check_trl_reading, fingerprint_ours, fingerprint_trl, trl_boundaries, trl_sides
from measure import BenchError, PeakMemory, alternate, check_same, resident
from torch import Tensor

from diglot.comparisons import Answers, Entry, ModelScores, Side, terms_of
from diglot.heads import default_chunk_rows

Stage = Callable[[], tuple[float, float]]  # value and number of items

# How TRL's loss is asked for; all other options have its defaults.
TRL_FORMS: dict[str, dict[str, Any]] = {
    "hybrid": {"uld_use_hybrid_loss": True},
    "sorted": {"uld_use_hybrid_loss": False},
    "hybrid by position": {"uld_use_hybrid_loss": True, "use_extended_uld": False},
}
OBJECTIVES: dict[str, dict[str, Any]] = {"strict": {"beta": 1.0}, "bpm": {}, "gold": {}}


def our_stage(case: Case, objective: str, chunk_rows: int | None = None) -> tuple[Stage, str]:
    """The stage of one of our objectives, and what it reads."""
    (term,) = terms_of([Entry(objective, 1.0, OBJECTIVES.get(objective, {}))], case.pair, {})
    sides = [Side(model.head, model.vocabulary, torch.tensor(model.stop_ids)) for model in (case.student, case.teacher)]
    sizes = case.pair.size_s, case.pair.size_t

    def rows(few: bool) -> int:
        return chunk_rows or default_chunk_rows(*sizes, "cpu", few_columns=few)

    def stage() -> tuple[float, float]:
        batch = case.batch()
        leaf = case.student.hidden.requires_grad_()
        hidden_s = leaf.flatten(0, 1)[batch.student.rows]
        answers = Answers(None, batch.teacher)
        answers.hidden = case.teacher.hidden.flatten(0, 1)[batch.teacher.rows]
        scores = ModelScores(batch, hidden_s, answers, *sides, chunk_rows=rows)
        plan = term.objective.plan(batch.written)
        loss, _ = term.objective.loss(plan, scores, 1.0 / plan.items)
        return _backward(case, loss), float(plan.items)

    return stage, fingerprint_ours(case.batch())


def trl_stage(case: Case, form: str) -> tuple[Stage, str]:
    """The stage of TRL's loss in one of its forms, and what it reads."""
    from trl.experimental.gold.gold_config import GOLDConfig
    from trl.experimental.gold.gold_trainer import ULDLoss

    defaults = {f.name: f.default for f in fields(GOLDConfig) if "uld" in f.name or f.name == "beta"}
    config = SimpleNamespace(**{**defaults, **TRL_FORMS[form]})
    loss = ULDLoss(config, case.student.tokenizer, case.teacher.tokenizer)
    sides: tuple[TRLSide, TRLSide] = trl_sides(case.batch())
    s, t = sides
    lengths = [[len(ids) for ids, _ in side.scored()] for side in sides]
    by_position = sum(map(min, *lengths))  # stop is left out by default
    items = float(len(trl_boundaries(sides)[0]) if config.use_extended_uld else by_position)

    def stage() -> tuple[float, float]:
        leaf = case.student.hidden.requires_grad_()
        logits_s = case.student.head(leaf)
        with torch.no_grad():
            logits_t = case.teacher.head(case.teacher.hidden)
        value = loss(logits_s, logits_t, s.labels, t.labels, s.input_ids, t.input_ids, s.offsets, t.offsets)
        return _backward(case, value), items

    return stage, fingerprint_trl(sides)


def _backward(case: Case, loss: Tensor) -> float:
    """Gradients of the hidden states and of the head, made anew; they are dropped, the value is kept."""
    weight = case.student.head.module.weight
    loss.backward()
    for leaf in (case.student.hidden, weight):
        if leaf.grad is None or not float(torch.linalg.vector_norm(leaf.grad)) > 0:
            raise BenchError(f"{case.name}: a loss stage gave no gradient, so it did not do the work that is timed.")
        leaf.grad = None
    return float(loss.detach())


# ---- one process per side ----------------------------------------------------------------------------------------


class Worker:
    """A process that runs one stage whenever it is told to, and measures it."""

    def __init__(self, case: Path, side: str, what: str, chunk_rows: int | None = None) -> None:
        self.name, self.value, self.items = f"{side} {what}", 0.0, 0.0
        self.peaks: list[int] = []
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, case, side, what, chunk_rows), daemon=True)
        self.process.start()
        theirs.close()
        self.fingerprint: str = self._answer()

    def __call__(self) -> float:
        """One run; its seconds."""
        self.connection.send(True)
        seconds, peak, self.value, self.items = self._answer()
        self.peaks.append(peak)
        print(f"  {self.name}: {seconds:.2f} s, {peak / 2**20:.0f} MiB", file=sys.stderr, flush=True)
        return float(seconds)

    @property
    def peak(self) -> float:
        """Bytes, the median over the runs, each above the level before the first one."""
        return statistics.median(self.peaks)

    def close(self) -> None:
        """End the process."""
        if self.process.is_alive():
            self.connection.send(None)
        self.process.join()

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError:
            self.process.join()
            raise BenchError(
                f"The process of {self.name!r} ended with code {self.process.exitcode}; -9 means that memory ran out: "
                "lower the rows of both sides."
            ) from None
        if isinstance(answer, BenchError):
            raise answer
        return answer


def _serve(connection: Any, path: Path, side: str, what: str, chunk_rows: int | None) -> None:
    case: Case = torch.load(path, weights_only=False)
    stage, fingerprint = our_stage(case, what, chunk_rows) if side == "ours" else trl_stage(case, what)
    connection.send(fingerprint)
    level = resident()
    while connection.recv():
        start = time.perf_counter()
        try:
            with PeakMemory(level) as memory:
                value, items = stage()
        except BenchError as error:
            connection.send(error)
            return
        connection.send((time.perf_counter() - start, memory.bytes, value, items))


def compare(case: Case, repeats: int, objectives: Sequence[str], forms: Sequence[str]) -> dict[str, Any]:
    """TRL's first form and our objectives in turn; then TRL's other forms against the first, once, for context."""
    notes = check_trl_reading(case)
    sides: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(case, path := Path(folder) / "case.pt")
        reference = Worker(path, "trl", forms[0])
        try:
            sides |= _against(reference, path, [("ours", name) for name in objectives], repeats, warm_up=True)
            for form in forms[1:]:  # one by one: each process holds the case, and TRL's forms take gigabytes more
                sides |= _against(reference, path, [("trl", form)], 1, warm_up=False)
        finally:
            reference.close()
    return {"sides": sides, "notes": notes, "texts": len(case.texts)}


def _against(
    reference: Worker, case: Path, sides: Sequence[tuple[str, str]], repeats: int, *, warm_up: bool
) -> dict[str, Any]:
    """What each side cost, and its ratio to the reference of the same rounds."""
    workers = [reference]
    try:
        workers += [Worker(case, side, what) for side, what in sides]
        check_same("tokens and boundaries", **{w.name: w.fingerprint for w in workers})
        timing = alternate({w.name: w for w in workers}, repeats, warm_up)
    finally:
        for worker in workers[1:]:
            worker.close()
    costs = {}
    for worker in workers[0 if warm_up else 1 :]:
        low, high = timing.spread(reference.name, worker.name)
        costs[worker.name] = {
            "seconds": timing.median(worker.name),
            "peak_mib": worker.peak / 2**20,
            "value": worker.value,
            "items": worker.items,
            "speedup": timing.ratio(reference.name, worker.name),
            "speedup_low": low,
            "speedup_high": high,
            "memory_ratio": worker.peak / reference.peak,
        }
    return costs
