"""TRL's `AsyncDistillationTrainer(rollout_worker=...)`: a worker whose teacher has another tokenizer."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diglot.engines.serving.forms import rows
from diglot.engines.serving.scorer import Scorer
from diglot.errors import DataError

Sample = Callable[[list[int]], Awaitable[list[int]]]
"""The student's prompt ids -> the ids that it samples after them, its stop with them."""


class RolloutWorker:
    """Samples, asks the teacher and puts rows of `teacher_top_k + 1` candidates on the queue, in a thread.

    Written against TRL 1.16.0. A token that the teacher says nothing about has no candidate, which TRL leaves out of
    its loss. Candidates are those of the covering distribution; where over a tenth of it is unknown the only one is
    the token that was written.

    Args:
        dataset: rows with `prompt`, messages; read again from the start when it ends. `DataError` if it has none.
        tokenizer: the student's.
        sample: asks the engine that holds the student's weights.
        scorer: of `diglot.engines.plugins.connect.connect`, or with a teacher of this process.
        teacher_top_k: as in the trainer's arguments.
        together: samples under way.
        queue_size: samples that wait for the trainer; the worker waits when there are as many.
    """

    def __init__(
        self,
        dataset: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        sample: Sample,
        scorer: Scorer,
        *,
        teacher_top_k: int = 8,
        together: int = 16,
        queue_size: int = 64,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not len(dataset):
            raise DataError("The dataset has no rows, expected prompts to sample from.")
        self.dataset, self.tokenizer, self.sample, self.scorer = dataset, tokenizer, sample, scorer
        self.top, self.together = teacher_top_k, together
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.rollout_buffer: queue.Queue[Any] = queue.Queue(queue_size)
        self.metrics_queue: queue.Queue[dict[str, Any]] = queue.Queue()
        self.model_version = 0
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._alive_at = time.time()
        self._thread: threading.Thread | None = None

    # ---- what the trainer calls --------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; a second call changes nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="diglot-rollouts", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End after what is under way."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def update_model_version(self, model_version: int) -> None:
        """The student's weights are new."""
        self.model_version = model_version

    def check_health(self, stale_after_s: float) -> None:
        """Raise what ended the worker, or that it hangs."""
        if self._failure is not None:
            raise RuntimeError("The rollout worker has failed; the cause is chained.") from self._failure
        if time.time() - self._alive_at > stale_after_s:
            raise RuntimeError(f"The rollout worker gave no sign of life for {stale_after_s:.0f} s.")

    # ---- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._loop())
        except BaseException as error:
            self._failure = error

    async def _loop(self) -> None:
        under_way: set[asyncio.Task[Any]] = set()
        count = 0
        while not self._stopped.is_set():
            self._alive_at = time.time()
            while len(under_way) < self.together:
                row = self.dataset[count % len(self.dataset)]
                under_way.add(asyncio.create_task(self._one(count, row)))
                count += 1
            done, under_way = await asyncio.wait(under_way, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await self._put(task.result())
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    async def _put(self, made: Any) -> None:
        while not self._stopped.is_set():
            self._alive_at = made.enqueued_at = time.time()
            try:
                return self.rollout_buffer.put_nowait(made)
            except queue.Full:
                await asyncio.sleep(0.05)

    async def _one(self, number: int, row: Mapping[str, Any]) -> Any:
        from trl.experimental.async_distillation.async_rollout_worker import RolloutSample

        version, messages = self.model_version, row["prompt"]
        prompt = self.tokenizer.apply_chat_template(
            messages, return_dict=False, add_generation_prompt=True, **self.chat_template_kwargs
        )
        completion = await self.sample(list(prompt))
        ids = np.asarray([*prompt, *completion], dtype=np.int64)
        result = await self.scorer.score(ids, self.top)
        names, logps = np.full((len(ids), self.top + 1), -1), np.full((len(ids), self.top + 1), -np.inf, np.float32)
        for at, entry in enumerate(rows(ids, result, self.top)):
            for k, (token, logp, _) in enumerate(sorted(entry or [], key=lambda one: -one[1])):
                names[at, k], logps[at, k] = token, logp
        self.metrics_queue.put({"rollout/coverage": (float(result.valid.sum()), float(max(result.sampled.sum(), 1)))})
        text = self.tokenizer.decode(completion, skip_special_tokens=False)
        return RolloutSample(
            prompt=messages,
            completion=[{"role": "assistant", "content": text}],
            input_ids=ids,
            completion_mask=np.repeat([0, 1], [len(prompt), len(completion)]),
            teacher_topk_ids=names,
            teacher_topk_logprobs=logps,
            model_version=version,
            metrics={},
            teacher_id="default",
            prompt_id=number,
        )
