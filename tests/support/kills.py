"""Runs that are killed: forked from one process that has everything loaded, so that fifty kills take a minute.

    python tests/support/kills.py OUT KIND enumerate  # exit at every write of a save, with and without a power cut
    python tests/support/kills.py OUT KIND sigkill KILLS  # SIGKILL at random moments, resume, compare with no kill
    python tests/support/kills.py OUT KIND sigterm  # SIGTERM, resume, compare

Prints one JSON object. KIND is gkd or minillm.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "src")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("DIGLOT_TABLES", "off")
warnings.filterwarnings("ignore", message=".*multi-threaded.*fork.*")

import support.tokenizers_zoo as zoo  # noqa: E402
import torch  # noqa: E402
from support import tiny  # noqa: E402

from diglot.checkpoints import durable, saving  # noqa: E402
from diglot.errors import StoppedError  # noqa: E402

SEED = 20261124
STEPS = 16
OPTIONS: dict[str, dict[str, Any]] = {
    # everything that a checkpoint keeps beside the model: projectors, the draw of lambda, the cache; rollouts
    "gkd": {"lmbda": 0.5, "objective": ["strict", {"name": "dskd", "weight": 0.1}]},
    "minillm": {"num_iterations": 2, "teacher_mixed_alpha": 0.3, "min_coverage": 0.0},
}


def make(kind: str, out: Path, **options: Any) -> Any:
    """A trainer that saves every step and keeps one checkpoint."""
    own = dict(OPTIONS[kind])
    if kind == "gkd":
        own["teacher_cache_dir"] = str(out / "teacher-cache")
    common = dict(save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=STEPS, lr_scheduler_type="linear")
    common |= dict(gradient_accumulation_steps=2, per_device_train_batch_size=2)
    build = {"gkd": tiny.gkd, "minillm": tiny.minillm}[kind]
    return build(out, zoo.chatml(), zoo.inst(), **{**own, **common, **options})


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a child, silent; its process id. The child never returns."""
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        work()
    except StoppedError as error:
        print(error, file=sys.stderr)
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


def check_run(run: Path) -> int:
    """What must hold after any kill, before and after tidying up; the step of the last whole checkpoint."""
    for name in ("before", "after"):
        for folder in run.glob("checkpoint-*"):
            durable.verify(folder)  # nothing under this name is incomplete
        step = int(saving.last_whole(run).name.removeprefix("checkpoint-"))
        if name == "before":
            durable.tidy(run)
    assert not list(run.glob(".saving-*")) and not list(run.glob(".removing-*"))
    return step


# ---- exit at every write ---------------------------------------------------------------------------------------

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def dies_at(nth: int, run: Path, power: bool) -> None:
    """From now on, end this process before the `nth` write below `run`; with a power cut what was not flushed tears."""
    old = {p.stat().st_ino for p in run.rglob("*") if p.is_file()}
    flushed, count = set(old), 0

    def write() -> None:
        nonlocal count
        count += 1
        if count < nth:
            return
        count = -(10**9)  # what follows is not counted
        for path in run.rglob("*") if power else ():
            if path.is_file() and path.stat().st_ino not in flushed:
                os.truncate(path, path.stat().st_size // 2)
        os._exit(9)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            writing = any(c in str(arguments[1] or "") for c in "wax+") or bool(
                int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            )
            if writing and str(arguments[0]).startswith(str(run)):
                write()
        elif event in WRITES and str(arguments[0]).startswith(str(run)):
            write()

    def fsync(handle: int, real: Callable[[int], None] = os.fsync) -> None:
        write()
        real(handle)
        flushed.add(os.fstat(handle).st_ino)

    os.fsync = fsync
    sys.addaudithook(hook)


def enumerate_writes(kind: str, out: Path) -> dict[str, Any]:
    """One child for each write of the second save."""
    trainer = make(kind, out / "first", max_steps=1)
    trainer.train()
    trainer.state.global_step = 2
    results: dict[str, list[int]] = {}
    for power in (False, True):
        steps: list[int] = []
        for nth in range(1, 1000):
            run = out / "work"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(out / "first", run)
            trainer.args.output_dir = str(run)

            def work(nth: int = nth, run: Path = run, power: bool = power) -> None:
                dies_at(nth, run, power)
                trainer._save_checkpoint(trainer.model, None)

            code = os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])
            assert code in (0, 9), (nth, code)
            steps.append(check_run(run))
            if code == 0:
                break
        results["power" if power else "plain"] = steps
    return results


# ---- signals ---------------------------------------------------------------------------------------------------


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Parameters, optimizer, projectors and random numbers."""
    results = {f"model.{n}": p.detach() for n, p in trainer.model.named_parameters()}
    results |= {f"projector.{n}": p.detach() for n, p in trainer.projectors.items()}
    for i, moments in trainer.optimizer.state_dict()["state"].items():
        results |= {f"optimizer.{i}.{n}": torch.as_tensor(v) for n, v in moments.items()}
    return {**results, "rng": torch.get_rng_state()}


def finish(kind: str, run: Path, resume: bool) -> dict[str, torch.Tensor]:
    trainer = make(kind, run)
    trainer.train(resume_from_checkpoint=resume)
    return state_of(trainer)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def resume_and_train(kind: str, run: Path) -> None:
    trainer = make(kind, run)
    trainer.train(resume_from_checkpoint=bool(list(run.glob("checkpoint-*"))))


def sigkill(kind: str, out: Path, kills: int) -> dict[str, Any]:
    """SIGKILL a random time after the run's first new save; a run that is near its end is finished and compared."""
    through = finish(kind, out / "through", resume=False)
    draw, run, reached, exact, in_a_save = random.Random(SEED), out / "run", [0], [], 0
    for _ in range(kills):
        child = forked(lambda: resume_and_train(kind, run))
        wait_for(lambda last=reached[-1]: newest(run) > last, child)  # type: ignore[misc]
        time.sleep(draw.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        in_a_save += bool(list(run.glob(".saving-*")) or list(run.glob(".removing-*")))
        reached.append(check_run(run))
        assert reached[-1] > reached[-2]
        if reached[-1] >= STEPS - 4:
            exact.append(reached[-1] == STEPS or equal(through, finish(kind, run, resume=True)))
            shutil.rmtree(run)
            reached.append(0)
    if run.exists():
        exact.append(reached[-1] == STEPS or equal(through, finish(kind, run, resume=True)))
    return {"reached": reached, "in_a_save": in_a_save, "exact": exact}


def newest(run: Path) -> int:
    return max((int(p.name.removeprefix("checkpoint-")) for p in run.glob("checkpoint-*")), default=0)


def wait_for(ready: Callable[[], Any], child: int) -> None:
    for _ in range(30_000):
        if ready():
            return
        assert os.waitpid(child, os.WNOHANG)[0] == 0, "the child ended"
        time.sleep(0.002)
    raise TimeoutError


def sigterm(kind: str, out: Path) -> dict[str, Any]:
    """SIGTERM behind the second save: exit 143, the step is saved, and the rest is exact."""
    through, run = finish(kind, out / "through", resume=False), out / "run"
    child = forked(lambda: make(kind, run, save_steps=2).train())
    wait_for(lambda: list(run.glob("checkpoint-*")), child)
    os.kill(child, signal.SIGTERM)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    step = check_run(run)
    return {"code": code, "step": step, "exact": equal(through, finish(kind, run, resume=True))}


def main(arguments: list[str]) -> None:
    out, kind, what = Path(arguments[0]), arguments[1], arguments[2]
    torch.set_num_threads(1)
    keep = os.dup(1)
    os.dup2(2, 1)  # the trainers' own prints
    if what == "enumerate":
        result = enumerate_writes(kind, out)
    elif what == "sigkill":
        result = sigkill(kind, out, int(arguments[3]))
    else:
        result = sigterm(kind, out)
    os.write(keep, (json.dumps(result) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
