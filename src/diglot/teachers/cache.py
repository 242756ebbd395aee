"""What the teacher said about texts of the data, kept on disk: hidden states of their scored rows.

They depend on the teacher's weights and configuration, on the ids that it reads, and, in the last bit, on how it was
run. All of this is in the key, so nothing has to be declared stale: what changed is not found.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diglot.batches import PackedSide
from diglot.errors import TeacherError
from diglot.heads import reads_prompts_once
from diglot.teachers.adapter import AdapterOff
from diglot.teachers.fingerprint import tensor_bytes, weights_digest
from diglot.teachers.local import LocalTeacher
from diglot.teachers.score_folder import text_keys
from diglot.teachers.teacher import Teacher, local

logger = logging.getLogger(__name__)

_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, RuntimeError)


class CachedTeacher:
    """Answers from files where they hold the answer, asks the teacher for the rest and keeps what it says.

    On the CPU the answer is the teacher's own to the bit: there a row of a batch does not depend on the other rows, but
    does on the width of the batch, so a text is found again in batches of the same width only. On other devices, where
    kernels promise no such thing, it is found in any batch.

    Args:
        teacher: whose answers are kept.
        folder: of the files, one for each text and way of running; several processes may share it.
        keep_free: bytes of the disk that no write may eat into; by default half of what is free without the folder.
    """

    def __init__(self, teacher: LocalTeacher, folder: str | Path, keep_free: int | None = None) -> None:
        self.teacher, self.folder = teacher, Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        taken = sum(f.stat().st_size for f in self.folder.rglob("*.safetensors"))
        self.keep_free = keep_free if keep_free is not None else (shutil.disk_usage(self.folder).free + taken) // 2
        self.hits = self.misses = 0
        self._full = False
        self._identity: tuple[Any, str] | None = None

    def take_counts(self) -> tuple[int, int]:
        """Texts that were found and that were not, since the last call."""
        counts = self.hits, self.misses
        self.hits = self.misses = 0
        return counts

    @torch.no_grad()
    def hidden(self, side: PackedSide) -> Tensor:
        """As `LocalTeacher.hidden`: the hidden state that predicts each scored token, [N_t, H_t]."""
        device, width = self.teacher.model.device, side.input_ids.shape[1]
        batch_of_row = (side.rows // width).cpu()
        counts = torch.bincount(batch_of_row, minlength=len(side.input_ids)).tolist()
        paths = [self._path(key) for key in self._keys(side)]
        states = [self._read(path, n) if n else None for path, n in zip(paths, counts, strict=True)]
        texts = [b for b, n in enumerate(counts) if n and states[b] is None]
        self.hits += sum(answer is not None for answer in states)
        self.misses += len(texts)
        if texts:
            part, at, _ = _part(side, texts, batch_of_row)
            if self._depends_on_batch(side) or self._shares_prompts(side.input_ids[part], at):
                texts = [b for b, n in enumerate(counts) if n]
            for b, answer in zip(texts, self._ask(side, texts, batch_of_row), strict=True):
                self._write(paths[b], answer)
                states[b] = answer
        answers = [answer.to(device) for answer in states if answer is not None]
        return torch.cat(answers) if answers else self.teacher.hidden(side)

    def _ask(self, side: PackedSide, rows: list[int], batch_of_row: Tensor) -> tuple[Tensor, ...]:
        """The teacher's answers about some rows of the batch, at the batch's own width."""
        part, at, counts = _part(side, rows, batch_of_row)
        states: tuple[Tensor, ...] = self.teacher.at_rows(side.input_ids[part], side.attention_mask[part], at).split(
            counts
        )
        return states

    # ---- keys --------------------------------------------------------------------------------------------------

    def _keys(self, side: PackedSide) -> list[str]:
        """What decides the answer about each row of the batch, as a digest."""
        common = (self.identity() + self._manner(side)).encode()
        return [hashlib.sha256(common + key).hexdigest() for key in text_keys(side)]

    def _manner(self, side: PackedSide) -> str:
        """How the teacher is run, as far as the answer's last bit depends on it."""
        device = self.teacher.model.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        manner = f"{device}/{autocast}/{self.teacher.model.config._attn_implementation}"
        if device != "cpu":
            return manner
        if self._depends_on_batch(side):
            whole = side.input_ids.numpy().tobytes() + side.rows.numpy().tobytes()
            manner += hashlib.sha256(whole).hexdigest()
        return f"{manner}/{side.input_ids.shape[1]}"

    def _depends_on_batch(self, side: PackedSide) -> bool:
        """Does the answer about a row depend on the batch's other rows?"""
        return self._shares_prompts(side.input_ids, side.rows)

    def _shares_prompts(self, input_ids: Tensor, rows: Tensor) -> bool:
        """Are prompts that rows have in common read once? Sums then have another order than without those rows."""
        model = self.teacher.model
        return model.device.type == "cpu" and reads_prompts_once(model, input_ids, rows)

    def identity(self) -> str:
        """Digests of weights and vocabulary, and versions of libraries; made anew when a weight was written to."""
        model = self.teacher.model
        tensors = [*model.named_parameters(), *model.named_buffers()]
        versions = [(name, x.data_ptr(), x._version) for name, x in tensors]
        if self._identity is None or self._identity[0] != versions:
            own = self.teacher.renderer.vocabulary.content_hash, weights_digest(model)
            self._identity = versions, "/".join([*own, torch.__version__, transformers.__version__])
        return self._identity[1]

    # ---- files -------------------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _read(self, path: Path, rows: int) -> Tensor | None:
        """The answer in a file; None if there is none or it is not what was written."""
        try:
            with safe_open(path, framework="pt") as file:
                answer: Tensor = file.get_tensor("hidden")
                checksum = (file.metadata() or {}).get("sha256")
        except FileNotFoundError:
            return None
        except _UNREADABLE as error:
            logger.warning("%s cannot be read (%s): the teacher is asked again.", path, error)
            return None
        if checksum != hashlib.sha256(tensor_bytes(answer)).hexdigest() or answer.shape[0] != rows:
            logger.warning("%s is damaged: the teacher is asked again.", path)
            return None
        return answer

    def _write(self, path: Path, answer: Tensor) -> None:
        """Keep an answer: into a file of another name first, so that none is ever half written."""
        answer = answer.detach().cpu().contiguous()
        size = answer.numel() * answer.element_size()
        if self._full or shutil.disk_usage(self.folder).free - size < self.keep_free:
            return self._stop(f"it may take half of the disk and {self.keep_free / 2**30:.1f} GiB stay free")
        unfinished = path.with_name(f"{uuid4().hex}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            save_file(
                {"hidden": answer}, unfinished, metadata={"sha256": hashlib.sha256(tensor_bytes(answer)).hexdigest()}
            )
            os.replace(unfinished, path)
        except (OSError, SafetensorError) as error:
            unfinished.unlink(missing_ok=True)
            self._stop(str(error))

    def _stop(self, why: str) -> None:
        if not self._full:
            logger.warning("The teacher cache %s takes no more: %s. What it holds is used.", self.folder, why)
        self._full = True


def _part(side: PackedSide, rows: list[int], batch_of_row: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Some rows of a batch, the places of what is scored in a batch of them alone, and how many each row has."""
    width, chosen = side.input_ids.shape[1], torch.tensor(rows)
    place = torch.full((len(side.input_ids),), -1).index_put((chosen,), torch.arange(len(rows)))[batch_of_row]
    wanted = place >= 0
    at = place[wanted] * width + (side.rows.cpu() % width)[wanted]
    counts = torch.bincount(place[wanted], minlength=len(rows)).tolist()
    return chosen.to(side.input_ids.device), at, counts


def cached(teacher: Teacher, folder: str | Path) -> CachedTeacher:
    """A cache of a teacher's hidden states. `TeacherError` for one that has none, or whose weights are in training."""
    held = local(teacher, "teacher_cache_dir (hidden states)")
    if isinstance(held, AdapterOff):
        raise TeacherError(
            "teacher_cache_dir keeps answers by the teacher's weights, and this teacher shares its modules with the "
            "student, whose weights change. Switch the cache off, or name the teacher's weights."
        )
    return CachedTeacher(held, folder)
