"""Two real models on a real task: samples of the student, its held-out text and exact answers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assets import MODELS, cache, fetch_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from diglot.batches import PairReader, pack
from diglot.data import Sample, to_sample
from diglot.evaluation import Evaluator
from diglot.evaluation.battery import Side
from diglot.evaluation.rows import row_facts, sample_of, sample_sums
from diglot.heads import evaluating, last_hidden
from diglot.objectives import Pair
from diglot.rendering import Conversation, Renderer
from diglot.rollouts import TransformersSampler
from diglot.teachers import LocalTeacher

from .bench import Split, one_of
from .declaration import Budget, DeclarationError
from .measures import Measure
from .retokenise import retokenise as write_retokenised
from .tasks import TASKS, Item, items

CHUNK = 8  # texts of the teacher in one file: what a kill can lose


class ModelsBench:
    """A student, a teacher and a task.

    Args:
        student, teacher: a name of `demo/assets.py`, a folder, or a hub id.
        task: one of `tasks.TASKS`.
        length: tokens of a completion in training and of samples.
        answer_length: tokens of a graded answer; default: `length`.
        pool: training prompts, of which each has one text of the teacher.
        samples: answers to each item; 1 is greedy, more are drawn at temperature 1 and averaged.
        run_programs: may grading run what a model wrote?
        retokenise: `{shuffle: seed, drop: share}`: give the student another tokenizer, see `retokenise`.
        batch: texts that are read or written at a time.
        micro_batch: prompts in each backward pass; default: all of a step.
    """

    def __init__(
        self,
        budget: Budget,
        folder: Path,
        student: str,
        teacher: str,
        task: str,
        length: int,
        answer_length: int | None = None,
        pool: int = 512,
        samples: int = 1,
        run_programs: bool = False,
        retokenise: dict[str, Any] | None = None,
        batch: int = 8,
        micro_batch: int | None = None,
    ) -> None:
        one_of("task", task, list(TASKS))
        self.names = (student, teacher)
        self.task, self.length, self.answer_length = task, length, answer_length or length
        self.samples, self.batch, self.items, self.folder = samples, batch, budget.items, folder
        self.graded = not TASKS[task].programs or run_programs
        self.retokenise = retokenise
        train = items(task, "train")
        if len(train) < pool:
            raise DeclarationError(f"task {task} has {len(train)} training prompts, not pool: {pool}.")
        self.pool = train[:pool]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.teacher_cache = folder / "scores"
        size = micro_batch or budget.batch
        if budget.batch % size:
            raise DeclarationError(f"micro_batch {size} does not divide the batch of {budget.batch}.")
        self.trainer_options: dict[str, Any] = dict(
            max_completion_length=length,
            max_length=length + 768,
            adam_beta2=0.98,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=budget.batch // size,
            **({"bf16": True} if self.device == "cuda" else {}),
        )

    @property
    def tokenizers(self) -> tuple[Any, Any]:
        """The student's and the teacher's."""
        return AutoTokenizer.from_pretrained(self._place(0)), AutoTokenizer.from_pretrained(self._place(1))

    def student(self) -> PreTrainedModel:
        """Read anew each time, in float32."""
        return AutoModelForCausalLM.from_pretrained(self._place(0), dtype=torch.float32).to(self.device)

    def teacher(self) -> PreTrainedModel:
        """Read once; in 16 bits on a GPU."""
        return self._sides[1].model

    def prompts(self, seed: int, count: int) -> list[dict[str, Any]]:
        """Rounds over the pool, each in another order."""
        return [{"prompt": self.pool[i].row["prompt"]} for i in self._order(seed, count)]

    def texts(self, seed: int, count: int) -> list[dict[str, Any]]:
        """The same prompts with the one text that the teacher wrote for each."""
        written = self._written()
        rows = []
        for i in self._order(seed, count):
            prompt, text = self.pool[i].row["prompt"], written[i]
            completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            rows.append({"prompt": prompt, "completion": completion})
        return rows

    def measure(self, student: PreTrainedModel, split: Split) -> dict[str, Measure]:
        """Samples of the student that the teacher reads, reference texts, and answers."""
        side = Side("student", student, self._renderer(student, 0))
        evaluator, samples = self._evaluator(side, self._sides[1]), self._samples(split)
        sampler = TransformersSampler(side.renderer.stop_ids, side.renderer.stop_id)
        conversations = [sample.conversation for sample in samples]
        report = evaluator.on_policy(conversations, sampler, max_new_tokens=self.length, seed=1000)
        if len(report.gap) != len(samples):
            raise DeclarationError(f"{len(samples) - len(report.gap)} prompts of {self.task} do not fit the student.")
        return {
            "reverse_kl": Measure.of(report.gap, report.num_bytes, "nats per byte"),
            "length": Measure.of(report.num_bytes, 1.0, "bytes"),
            "stopped": Measure.of(report.stopped, 1.0, "share"),
            **self._read(side, evaluator, split),
        }

    def measure_teacher(self, split: Split) -> dict[str, Measure]:
        """Reference texts and answers."""
        side = self._sides[1]
        return self._read(side, self._evaluator(side, side), split)

    def _read(self, side: Side, evaluator: Evaluator, split: Split) -> dict[str, Measure]:
        bits, size, digits, digit_size = self._bits(side, evaluator, self._samples(split))
        measures = {"bits_per_byte": Measure.of(bits, size, "bits per byte")}
        if digit_size.sum():
            measures["digits_bits_per_byte"] = Measure.of(digits, digit_size, "bits per byte")
        if self.graded and self._held(split)[0].grade is not None:
            measures["accuracy"] = self._accuracy(side, split)
        return measures

    @torch.no_grad()
    def _bits(self, side: Side, evaluator: Evaluator, samples: Sequence[Sample]) -> tuple[np.ndarray, ...]:
        """Of each reference text: bits and bytes of its tokens, and of those that hold a digit; no stop."""
        table = side.renderer.vocabulary
        has_digit = torch.tensor([any(48 <= byte <= 57 for byte in token) for token in table.tokens()])
        sizes = torch.from_numpy(table.lengths)
        columns = []
        with evaluating(side.model):
            for start in range(0, len(samples), self.batch):
                read = [evaluator.reader.reference(sample) for sample in samples[start : start + self.batch]]
                batch = [one for one in read if one is not None]
                packed = pack(batch, [len(one.segment_bytes) for one in batch], side.renderer.stop_id).to(self.device)
                hidden = last_hidden(side.model, packed.input_ids, packed.attention_mask).flatten(0, 1)[packed.rows]
                stops = torch.tensor(side.renderer.stop_ids)
                facts = row_facts(hidden, packed, evaluator.head, stops, evaluator.chunk_rows)
                text, ids = ~packed.stop.cpu(), packed.targets.cpu()
                nats, digits = -facts.logp.double() * text, has_digit[ids] & text
                values = (nats, sizes[ids] * text, nats * digits, sizes[ids] * digits)
                columns.append([sample_sums(value, sample_of(packed), len(batch)) for value in values])
        nats, size, digit_nats, digit_size = (np.concatenate(column) for column in zip(*columns, strict=True))
        return nats / math.log(2), size, digit_nats / math.log(2), digit_size

    def _accuracy(self, side: Side, split: Split) -> Measure:
        held = self._held(split)
        greedy = dict(top_k=1) if self.samples == 1 else {}
        sampler = TransformersSampler(side.renderer.stop_ids, side.renderer.stop_id, **greedy)
        conversations = [sample.conversation for sample in self._samples(split)]
        right = np.zeros(len(held))
        for turn in range(self.samples):
            seed = 5000 + 97 * turn
            texts = replies(side.model, side.renderer, sampler, conversations, self.answer_length, self.batch, seed)
            for i, text in enumerate(texts):
                grade = held[i].grade
                assert grade is not None
                right[i] += grade(text)
        return Measure.of(right, float(self.samples), "share")

    def _evaluator(self, side: Side, other: Side) -> Evaluator:
        mine, theirs = side.renderer, other.renderer
        pair = Pair.of_renderers(mine, theirs)
        reader = PairReader(
            mine, theirs, same_vocabulary=pair.same, max_length=side.max_length, teacher_max_length=other.max_length
        )
        return Evaluator(side.model, reader, LocalTeacher(other.model, theirs), pair, batch_size=self.batch)

    @property
    def _sides(self) -> tuple[None, Side]:
        """The teacher, loaded once."""
        if not hasattr(self, "_loaded"):
            dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
            model = AutoModelForCausalLM.from_pretrained(self._place(1), dtype=dtype).to(self.device).eval()
            self._loaded = (None, Side("teacher", model, self._renderer(model, 1)))
        return self._loaded

    def _renderer(self, model: PreTrainedModel, which: int) -> Renderer:
        return Renderer.of_model(model, self.tokenizers[which], name=("student", "teacher")[which])

    def _place(self, which: int) -> str:
        """Where the model is; a student with another tokenizer is made on first use."""
        name = self.names[which]
        place = str(fetch_model(name)) if name in MODELS else name
        if which or self.retokenise is None:
            return place
        key = hashlib.sha256(json.dumps([place, self.retokenise], sort_keys=True).encode()).hexdigest()[:16]
        target = cache() / "students" / key
        if not target.exists():
            part = target.with_name(f".{key}.{os.getpid()}")
            write_retokenised(Path(place), part, **self.retokenise)
            part.rename(target)
        return str(target)

    @lru_cache(maxsize=2)  # noqa: B019 -- benches live as long as their process
    def _held(self, split: Split) -> list[Item]:
        held = items(self.task, split)
        if len(held) < self.items:
            raise DeclarationError(f"task {self.task} has {len(held)} items in {split}, not {self.items}.")
        return held[: self.items]

    def _samples(self, split: Split) -> list[Sample]:
        return [to_sample(item.row, where=f"{split} item {i}") for i, item in enumerate(self._held(split))]

    def _order(self, seed: int, count: int) -> list[int]:
        order: list[int] = []
        draw = random.Random(seed)
        while len(order) < count:
            order += draw.sample(range(len(self.pool)), len(self.pool))
        return order[:count]

    @lru_cache(maxsize=1)  # noqa: B019 -- benches live as long as their process
    def _written(self) -> list[str]:
        """The teacher's text for each prompt of the pool, sampled at temperature 1, kept in files of a few."""
        side = self._sides[1]
        key = hashlib.sha256(json.dumps([self.names[1], self.task, self.length]).encode()).hexdigest()[:16]
        place = self.folder / "texts" / key
        place.mkdir(parents=True, exist_ok=True)
        evaluator = self._evaluator(side, side)
        sampler = TransformersSampler(side.renderer.stop_ids, side.renderer.stop_id)
        texts: list[str] = []
        for start in range(0, len(self.pool), CHUNK):
            part = self.pool[start : start + CHUNK]
            path = place / f"{start:06}-{len(part)}.json"
            if not path.exists():
                rows = [to_sample(item.row, where=f"prompt {start + i}") for i, item in enumerate(part)]
                pairs = evaluator.write([row.conversation for row in rows], sampler, self.length, start)
                written = [pair.student.segment_bytes[-1].decode("utf-8", "ignore") or " " for pair in pairs]
                if len(written) != len(part):
                    raise DeclarationError(f"some prompts of {self.task} do not fit the teacher.")
                beside = path.with_suffix(f".{os.getpid()}")
                beside.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
                beside.replace(path)
            texts += json.loads(path.read_text(encoding="utf-8"))
        return texts


def replies(
    model: PreTrainedModel,
    renderer: Renderer,
    sampler: TransformersSampler,
    conversations: Sequence[Conversation],
    length: int,
    batch: int,
    seed: int,
) -> list[str]:
    """What a model writes to each conversation, in `length` tokens at most, without its stop."""
    prompts = [renderer.prompt_ids(one) for one in conversations]
    texts: list[str] = []
    for start in range(0, len(prompts), batch):
        written = sampler(model, prompts[start : start + batch], max_new_tokens=length, seed=seed + start)
        own = [renderer.vocabulary.bytes_of(_unstopped(ids, renderer.stop_ids)) for ids in written]
        texts += [text.decode("utf-8", "replace") for text in own]
    return texts


def _unstopped(ids: np.ndarray, stops: Sequence[int]) -> np.ndarray:
    return ids[:-1] if len(ids) and int(ids[-1]) in stops else ids
