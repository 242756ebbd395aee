"""From a student's ids to what a teacher with another tokenizer says about them, many at a time."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diglot.arrays import Ints
from diglot.engines.project import Projected, Projector
from diglot.engines.scores import TeacherScores
from diglot.engines.serving.upstream import Upstream
from diglot.engines.turns import TurnFinder

_WITH_STOPS = 8  # likeliest ids that are read of a teacher with several stop ids, whose masses are added


class Scorer:
    """Finds the turns in ids, asks the teacher about its own reading of them and projects.

    Args:
        concurrency: texts that the teacher is asked about at a time.
        credit: how the tokens of a chunk share its log-prob.
        threads: for finding and projecting, which are work of this process.
    """

    def __init__(
        self,
        projector: Projector,
        upstream: Upstream,
        *,
        concurrency: int = 16,
        credit: str = "shared",
        threads: int = 2,
    ) -> None:
        self.projector, self.upstream, self.credit = projector, upstream, credit
        self.finder = TurnFinder(projector.student)
        self._least = _WITH_STOPS if len(projector.teacher.stop_ids) > 1 else 0
        self._asking = asyncio.Semaphore(concurrency)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="diglot-project")

    async def score(self, ids: Ints, top: int = 0, *, student_logps: Any = None) -> Projected:
        """Scores of one context in the student's ids.

        Args:
            top: how many of the teacher's likeliest ids of each row.
            student_logps: `[n]` nats, for credit "gap".

        Raises:
            DataError: ids in which the turns are not sure.
            DiglotError: a conversation that the teacher does not take, or a teacher that gives no answer.
        """
        loop = asyncio.get_running_loop()
        reading = await loop.run_in_executor(self._threads, lambda: self.projector.read(self.finder.find(ids)))
        if reading.first_scored < len(reading.teacher_ids):
            async with self._asking:
                scores = await self.upstream.score(
                    reading.teacher_ids, max(top, self._least) if top or self._least else 0
                )
        else:
            scores = TeacherScores.of([0.0] * len(reading.teacher_ids))  # nothing is scored, so none of them is read
        return await loop.run_in_executor(
            self._threads,
            lambda: self.projector.project(reading, scores, credit=self.credit, student_logps=student_logps),
        )

    async def close(self) -> None:
        """Let go of threads and of the teacher."""
        self._threads.shutdown()
        await self.upstream.close()
