"""Score fixed texts once and keep what the teacher said, so that any student can be trained from it later.

Interrupted at any moment, it goes on at the first shard that is not there, and the folder is in the end the same to the
byte: a shard holds a fixed range of texts, in fixed batches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from diglot.batches import PackedSide, WrittenSide, pack, teacher_reads
from diglot.data import Sample
from diglot.errors import DataError, TeacherError
from diglot.heads import default_chunk_rows, log_softmax, logits_by_parts, summaries
from diglot.objectives.byte import OwnDistributions, byte_distribution
from diglot.rendering import Rendered, truncate
from diglot.teachers.fingerprint import weights_digest
from diglot.teachers.local import LocalTeacher
from diglot.teachers.score_folder import (
    FORMAT,
    INDEX,
    LEVELS,
    REQUEST,
    Answer,
    Folder,
    Shard,
    differences,
    text_keys,
    write_json,
    write_shard,
)
from diglot.teachers.scored import tokenizer_of
from diglot.teachers.teacher import Teacher, gives_rows


@dataclass(frozen=True)
class Reading:
    """How the texts are read. Training from the scores reads them the same way."""

    score_turns: str = "last"
    system_prompt: str | None = None
    thinking: bool = False
    template_kwargs: Mapping[str, Any] | None = None
    max_length: int | None = None
    markers: str = "read"
    fold_system: bool = False


@dataclass(frozen=True)
class Manner:
    """How scoring is done: `shard_texts` samples in a file, `batch_size` of them read at a time, `k` likeliest ids."""

    level: str = "logprobs"
    k: int = 16
    batch_size: int = 8
    shard_texts: int = 512


def score_texts(
    teacher: Teacher,
    samples: Sequence[Sample],
    out: Path,
    *,
    data: str,
    reading: Reading,
    manner: Manner,
    generation_eos: Any = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Folder:
    """Write the teacher's scores of the samples' replies into `out`; what is there of the same request is kept.

    Args:
        data: the name of the texts, for messages.
        generation_eos: the end-of-text ids of the model's generation config.
        progress: told how many texts are done, of how many.

    Raises:
        TeacherError: `out` holds scores of another request (the message says what differs), or the level takes a
            teacher in this process.
        DataError: a sample without a reply.
    """
    request = _request(teacher, samples, data, reading, manner, generation_eos)
    if (out / REQUEST).exists():
        old = json.loads((out / REQUEST).read_text(encoding="utf-8"))
        if differing := differences(_deciding(old), _deciding(json.loads(json.dumps(request)))):
            raise TeacherError(
                f"{out} holds scores of something else: {'; '.join(differing)}. Choose another folder, or remove it."
            )
        if (out / INDEX).exists():
            return Folder.open(out)
    else:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise TeacherError(f"{out} is not empty and holds no scores. Choose another folder.")
        teacher.renderer.tokenizer.save_pretrained(out / "tokenizer")
        write_json(out / REQUEST, request)
    for unfinished in out.glob("*.tmp"):
        unfinished.unlink()
    starts = range(0, len(samples), manner.shard_texts)
    skipped, scorer = 0, _Scorer(teacher, manner)
    for number, start in enumerate(starts):
        path = out / f"shard-{number:05d}.safetensors"
        read = [_read(teacher, sample, reading) for sample in samples[start : start + manner.shard_texts]]
        rendered = [r for r in read if r is not None]
        skipped += len(read) - len(rendered)
        if not path.exists():
            for done in _write(path, scorer, rendered, manner.batch_size):
                progress(start + done, len(samples))
        progress(start + len(read), len(samples))
    return _finish(out, len(starts), skipped)


def _request(
    teacher: Teacher, samples: Sequence[Sample], data: str, reading: Reading, manner: Manner, generation_eos: Any
) -> dict[str, Any]:
    """All that decides the files, as plain values."""
    if manner.level not in LEVELS:
        raise TeacherError(f"level={manner.level!r} is unknown: choose one of {', '.join(LEVELS)}.")
    if manner.level == "bytes" and not gives_rows(teacher):
        raise TeacherError(
            f"Next-byte distributions take whole rows, and the teacher is {teacher.name}, which gives "
            f"{teacher.level.name}. Choose the level logprobs or top_k."
        )
    texts = hashlib.sha256()
    for sample in samples:
        conversation = json.dumps(asdict(sample.conversation), sort_keys=True, ensure_ascii=False)
        texts.update(json.dumps([conversation, sample.reply, repr(sample.answer)]).encode())
    model = teacher.model if isinstance(teacher, LocalTeacher) else None
    return {
        "format": FORMAT,
        "level": manner.level,
        "k": manner.k if manner.level == "top_k" else 0,
        "teacher": {
            "name": teacher.name,
            "weights": None if model is None else weights_digest(model),
            "dtype": None if model is None else str(model.dtype),
        },
        "tokenizer": tokenizer_of(teacher.renderer, reading.template_kwargs),
        "data": data,
        "texts": {"number": len(samples), "sha256": texts.hexdigest()},
        "reading": {
            **asdict(reading),
            "template_kwargs": dict(reading.template_kwargs or {}),
            "max_length": _limit(teacher, reading),
            "num_embeddings": len(teacher.renderer.vocabulary),
            "eos_token_id": generation_eos,
        },
        "manner": {"batch_size": manner.batch_size, "shard_texts": manner.shard_texts},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _deciding(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request without names, which may be spelt otherwise: weights and texts are in it by their digests."""
    teacher = {k: v for k, v in request["teacher"].items() if k != "name" or request["teacher"]["weights"] is None}
    return {**{k: v for k, v in request.items() if k != "data"}, "teacher": teacher}


def _limit(teacher: Teacher, reading: Reading) -> int | None:
    return min((n for n in (reading.max_length, teacher.max_length) if n is not None), default=None)


def _read(teacher: Teacher, sample: Sample, reading: Reading) -> Rendered | None:
    """A text as the teacher reads it; None if its prompt alone fills the limit."""
    if sample.reply is None:
        raise DataError(f"{sample.where} has no reply, so there is no text to score. Give rows with a completion.")
    rendered = teacher.renderer.render(
        teacher_reads(sample.conversation, reading.system_prompt),
        sample.answer or sample.reply,
        score="all" if reading.score_turns == "all" else "last",
        thinking=reading.thinking,
    )
    limit = _limit(teacher, reading)
    try:
        return truncate(rendered, limit) if limit else rendered
    except DataError:
        return None


def _write(path: Path, scorer: _Scorer, texts: Sequence[Rendered], batch_size: int) -> Iterator[int]:
    """Write a shard, and say after each batch how many of its texts are scored."""
    keys: list[bytes] = []
    answers: list[Answer] = []
    for start in range(0, len(texts), batch_size):
        some = texts[start : start + batch_size]
        side = pack(some, [max(len(r.segment_bytes), 1) for r in some], scorer.pad_id)
        keys += text_keys(side)
        answers += scorer.answers(side)
        yield start + len(some)
    write_shard(path, keys, answers)


def _finish(out: Path, count: int, skipped: int) -> Folder:
    """Write the index: sizes and counts of the shards."""
    shards: list[dict[str, Any]] = []
    totals = {"texts": 0, "tokens": 0, "text_bytes": 0}
    for number in range(count):
        shard = Shard(out / f"shard-{number:05d}.safetensors")
        size = shard.path.stat().st_size
        shards.append({"file": shard.path.name, "bytes": size, "texts": len(shard.keys), "tokens": shard.tokens})
        totals["texts"] += len(shard.keys)
        totals["tokens"] += shard.tokens
        totals["text_bytes"] += shard.text_bytes
    total = sum(int(one["bytes"]) for one in shards)
    per_token = round(total / max(totals["tokens"], 1), 1)
    about = {"format": FORMAT, **totals, "skipped": skipped, "bytes": total, "bytes_per_token": per_token}
    write_json(out / INDEX, {**about, "shards": shards})
    return Folder.open(out)


class _Scorer:
    """Asks the teacher about a batch, and splits what it says into answers about single texts."""

    def __init__(self, teacher: Teacher, manner: Manner) -> None:
        self.teacher, self.manner = teacher, manner
        self.pad_id = teacher.renderer.stop_id
        self.k = manner.k if manner.level == "top_k" else 0
        teacher.want(self.k)
        stop = torch.tensor(list(teacher.renderer.stop_ids), dtype=torch.int64)
        self.distributions = OwnDistributions(teacher.renderer.vocabulary, stop) if manner.level == "bytes" else None
        self.stop = stop

    @torch.no_grad()
    def answers(self, side: PackedSide) -> list[Answer]:
        """One for each row of the batch."""
        ends = np.unique(side.segment, return_index=True)[1]
        if gives_rows(self.teacher):
            hidden = self.teacher.hidden(side)
            columns, distributions = self._columns(hidden, side), self._distributions(hidden, side)
        else:
            request = self.teacher.ask(side)
            assert request is not None
            scores: Any = request.result()
            columns = [scores.logps, scores.written, scores.top_ids[:, : self.k], scores.top_logps[:, : self.k]]
            distributions = [np.zeros((0, 257), np.float16)] * len(ends)
        row = (side.rows // side.input_ids.shape[1]).cpu().numpy()
        segment_row = row[ends]
        kinds: list[Any] = [np.float32, np.float32, np.int32, np.float32]
        arrays = [x.cpu().numpy().astype(kind) for x, kind in zip(columns, kinds, strict=True)]
        answers = []
        for b in range(len(side.input_ids)):
            own = [distributions[g] for g in np.flatnonzero(segment_row == b)] if self.distributions is not None else []
            counts = np.array([len(x) for x in own], dtype=np.int64)
            joined = np.concatenate([np.zeros((0, 257), np.float16), *own])
            logps, written, top_ids, top_logps = (x[row == b] for x in arrays)
            answers.append(Answer(logps, written, top_ids, top_logps, joined, counts))
        return answers

    def _columns(self, hidden: Tensor, side: PackedSide) -> list[Tensor]:
        """Log-probs of the text and of the written ids, the likeliest ids and theirs: one pass over the head."""
        assert gives_rows(self.teacher)
        size, stop_ids = len(self.teacher.renderer.vocabulary), self.stop.to(hidden.device)
        blocks = []
        chunk_rows, side = default_chunk_rows(size, size, hidden.device), side.to(hidden.device)
        for rows, logits in logits_by_parts(hidden, self.teacher.head, chunk_rows):
            logps = log_softmax(logits)
            written = logps.gather(-1, side.targets[rows, None])[:, 0]
            text = torch.where(side.stop[rows], logps[:, stop_ids].logsumexp(-1), written)
            best = logps.topk(self.k, dim=-1)
            blocks.append((text, written, best.indices, best.values))
        return [torch.cat(parts) for parts in zip(*blocks, strict=True)]

    def _distributions(self, hidden: Tensor, side: PackedSide) -> list[np.ndarray]:
        """For each segment its distributions, `[l, 257]` float16; NaN at bytes that no plain token holds."""
        segments = np.unique(side.segment)
        if self.distributions is None:
            return [np.zeros((0, 257), np.float16)] * len(segments)
        assert gives_rows(self.teacher)
        written = WrittenSide(side.targets.cpu().numpy(), side.end, side.segment, side.exact, side.stop.cpu().numpy())
        plan, segment, position = self.distributions.plan(written)
        size = len(self.teacher.renderer.vocabulary)
        rows = default_chunk_rows(size, size, hidden.device)
        plan = plan.to(hidden.device)
        masses = summaries(self.distributions.summary(plan), hidden, self.teacher.head, rows)
        distributions = byte_distribution(masses, plan)[0].float().cpu().numpy().astype(np.float16)
        dense = []
        for g in segments:
            of_segment = np.full((int(side.end[side.segment == g].max()), 257), np.nan, dtype=np.float16)
            of_segment[position[segment == g]] = distributions[segment == g]
            dense.append(of_segment)
        return dense
