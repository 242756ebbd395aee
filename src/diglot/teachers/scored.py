"""A teacher of which only its scores are left: it answers about the texts that it was asked about, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diglot.batches import PackedSide
from diglot.errors import TeacherError, VocabularyError
from diglot.objectives.levels import Level
from diglot.rendering import Renderer
from diglot.teachers.fingerprint import template_digest
from diglot.teachers.score_folder import Answer, Folder, Shard, differences, text_keys
from diglot.vocabulary import load_tokenizer


@dataclass(frozen=True)
class StoredScores:
    """What was kept about a batch of `N` scored tokens, in nats, on the CPU; constants."""

    written: Tensor  # float32 [N]
    logps: Tensor  # float32 [N], for stop the log of the mass of the whole stop set
    top_ids: Tensor  # int64 [N, k]
    top_logps: Tensor  # float32 [N, k]
    distribution_rows: Tensor  # float16 [L, 257]
    distribution_start: Tensor  # int64 [S] the row of each segment's first byte, -1: nothing kept

    def result(self) -> StoredScores:
        """Itself: there is nothing to wait for."""
        return self

    def text(self, stop_as_set: bool) -> Tensor:
        """Log-probs of the text, `[N]`: stop as one event, or as the id that was written."""
        return self.logps if stop_as_set else self.written

    def distributions(self, segment: Tensor, position: Tensor) -> Tensor:
        """Next-byte distributions at these bytes, float32 `[I, 257]`; each adds up to 1."""
        rows = self.distribution_rows[(self.distribution_start[segment.cpu()] + position.cpu())].float()
        if bool(rows.isnan().any()):
            raise TeacherError("The scores hold no next-byte distribution for a byte that both sides can compare.")
        return rows / rows.sum(-1, keepdim=True)


class ScoredTeacher:
    """Answers from a folder of `diglot score`. No weights are loaded.

    Args:
        folder: finished scores.
        tokenizer: the teacher's; by default the one that was kept with the scores.
        options: of reading (`score_turns`, `system_prompt`, `max_length`, `template_kwargs`, `markers`, `fold_system`),
            where they are given.

    Raises:
        TeacherError: the folder is unfinished or damaged, or tokenizer or options are not those of the scores.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Folder.open(Path(folder).expanduser())
        request = self.folder.request
        reading = {name: value for name, value in (options or {}).items() if value is not None}
        self._check({name: request["reading"].get(name) for name in reading}, reading)
        template_kwargs = request["reading"]["template_kwargs"]
        if tokenizer is None:
            tokenizer = load_tokenizer(str(self.folder.path / "tokenizer"))
        self.renderer = self._renderer(tokenizer, request["reading"])
        self._check(request["tokenizer"], tokenizer_of(self.renderer, template_kwargs))
        self.max_length: int | None = request["reading"]["max_length"]
        self._place: dict[bytes, tuple[Shard, int]] = {}
        for shard in self.folder.shards():
            self._place |= {key: (shard, i) for i, key in enumerate(shard.keys)}

    def _renderer(self, tokenizer: PreTrainedTokenizerBase, reading: Mapping[str, Any]) -> Renderer:
        stops: Any = SimpleNamespace(eos_token_id=reading["eos_token_id"])
        try:
            return Renderer(
                tokenizer,
                num_embeddings=reading["num_embeddings"],
                generation_config=stops,
                chat_template_kwargs=reading["template_kwargs"],
                fold_system=reading["fold_system"],
                markers=reading["markers"],
                name="teacher",
            )
        except VocabularyError as error:
            raise TeacherError(f"The scores in {self.folder.path} were made with another tokenizer: {error}") from error

    @property
    def level(self) -> Level:
        """The most of the ladder that was kept."""
        return Level.TOP_K if self.folder.request["level"] == "top_k" else Level.TEXT_LOGPROBS

    @property
    def also(self) -> frozenset[str]:
        """Objectives beside the ladder: `byte`, where next-byte distributions were kept."""
        return frozenset({"byte"} if self.folder.request["level"] == "bytes" else ())

    @property
    def name(self) -> str:
        """Whose scores, and where they are."""
        return f"{self.model_name} (scores in {self.folder.path})"

    @property
    def model_name(self) -> str:
        """Whose scores."""
        return str(self.folder.request["teacher"]["name"])

    def to(self, device: torch.device | str) -> None:
        """Nothing to move."""

    def want(self, top: int) -> None:
        """`TeacherError` if fewer than `top` likeliest ids were kept."""
        if top > (k := int(self.folder.request["k"])):
            raise TeacherError(
                f"{top} likeliest ids of each row are read, and {self.folder.path} holds {k}. Lower the objective's k, "
                f"or score the texts again with --k {top}."
            )

    def break_off(self) -> None:
        """Nothing is under way."""

    def ask(self, side: PackedSide, stop_as_set: bool = True) -> StoredScores:
        """The answers about a batch. `TeacherError` if a text is not among those that were scored."""
        wanted = [b for b, _, _ in side.texts()]
        keys = text_keys(side)
        if missing := [b for b in wanted if keys[b] not in self._place]:
            raise TeacherError(self._foreign(side, missing, len(wanted)))
        answers = []
        for b in wanted:
            shard, i = self._place[keys[b]]
            answers.append(shard.read(i))
        return _packed(side, answers)

    def _foreign(self, side: PackedSide, missing: list[int], count: int) -> str:
        """What a text that was not scored looks like, and what may be the reason."""
        first = side.input_ids[missing[0]][side.attention_mask[missing[0]] > 0].tolist()
        shown, reading = self.renderer.tokenizer.decode(first), self.folder.request["reading"]
        return (
            f"{len(missing)} of {count} texts of a batch are not among the {self.folder.index['texts']} in "
            f"{self.folder.path}. The first, as the teacher reads it: {shown!r:.200}. They were scored from "
            f"{self.folder.request['data']!r} with score_turns={reading['score_turns']!r}, thinking="
            f"{reading['thinking']}, max_length={reading['max_length']}. Train on those texts, or score these."
        )

    def _check(self, stored: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        if differing := differences(stored, here):
            raise TeacherError(
                f"The scores in {self.folder.path} were made otherwise: {'; '.join(differing)}. Use what they were "
                "made with, or score the texts again."
            )


def tokenizer_of(renderer: Renderer, template_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """What decides how a teacher reads text."""
    return {
        "vocabulary": renderer.vocabulary.content_hash,
        "size": len(renderer.vocabulary),
        "template": template_digest(renderer, template_kwargs),
        "stop_ids": sorted(int(i) for i in renderer.stop_ids),
    }


def _packed(side: PackedSide, answers: list[Answer]) -> StoredScores:
    """Answers about single texts as one batch: rows of a text are neighbours, in order."""
    distribution_start = np.full(int(side.segment.max(initial=-1)) + 1, -1, dtype=np.int64)
    rows = 0
    for (_, own, _), answer in zip(side.texts(), answers, strict=True):
        if len(answer.distribution_counts):
            starts = rows + np.concatenate([[0], np.cumsum(answer.distribution_counts)[:-1]])
            distribution_start[np.unique(side.segment[own])] = starts
        rows += len(answer.distributions)

    def joined(name: str, dtype: Any, tail: tuple[int, ...] = ()) -> Tensor:
        parts = [getattr(a, name) for a in answers] or [np.zeros((0, *tail))]
        return torch.from_numpy(np.concatenate(parts).astype(dtype))

    return StoredScores(
        written=joined("written", np.float32),
        logps=joined("logps", np.float32),
        top_ids=joined("top_ids", np.int64, (0,)),
        top_logps=joined("top_logps", np.float32, (0,)),
        distribution_rows=joined("distributions", np.float16, (257,)),
        distribution_start=torch.from_numpy(distribution_start),
    )
