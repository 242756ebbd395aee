"""X-Token's projection W: which teacher tokens stand for a student token (arXiv 2605.21699)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from diglot.arrays import Ints
from diglot.errors import VocabularyError
from diglot.vocabulary.encoder import Speller
from diglot.vocabulary.table import Vocabulary

SLOTS = 4  # non-zeros of a row
FIRST, DECAY = 0.9, 0.1  # piece i of a student token weighs FIRST * DECAY ** (i - 1), before a row is normalised
REVERSE = 0.2  # what a teacher token without preimage gets of the row of the student token that it begins with
_FORMAT = 1
_ARRAYS, _RECORD = "projection.safetensors", "projection.json"


@dataclass(frozen=True, eq=False)
class Projection:
    """W, `[V_s, V_t]`: non-negative, each row empty or of sum 1, at most four entries in a row, heaviest first.

    A row says, in one step, with which teacher tokens the bytes of a student token are written. Padding rows, and
    control tokens that play no role on the other side, have empty rows.
    """

    ids: Ints  # [V_s, 4] teacher ids, -1 for an empty slot
    weights: NDArray[np.float32]  # [V_s, 4], 0 in empty slots
    size_t: int  # V_t
    student: str  # content hash of the student's vocabulary
    teacher: str  # of the teacher's
    rules: Mapping[str, Any] = field(default_factory=dict)  # how it was made

    def __post_init__(self) -> None:
        problem = _problem(self.ids, self.weights, self.size_t)
        if problem:
            raise VocabularyError(f"This is not a projection onto {self.size_t} teacher ids: {problem}. Build it anew.")

    @classmethod
    def build(
        cls,
        student: Vocabulary,
        teacher: Vocabulary,
        spell_t: Speller,
        *,
        roles: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
        reverse: bool = False,
        spell_s: Speller | None = None,
    ) -> Projection:
        """W by rule; equal tables give the identity.

        1. A teacher token with the same bytes gets weight 1. Of several, the one that the teacher itself would write.
        2. Otherwise piece `i` of what the teacher makes of the token's text gets `0.9 * 0.1 ** (i - 1)`. Of more than
           four pieces the first four count, equal pieces are added up, the row is normalised. Tokens that are no text
           (a piece of a character), or that the teacher's tokenizer would change, are cut greedily into the longest
           teacher tokens. A token that the teacher cannot write at all has an empty row.
        3. With `reverse`, a teacher token that no row names is spelt by the student, and the student token that it
           begins with gives it its last slot and 0.2 of its weight. Only one can have it: the shortest.
        4. A control token is matched by role, then by equal name, and is never split. Fuzzy string similarity does
           not know what a token does: `<|im_end|>` is more like `<|im_start|>`, its opposite, than `<end_of_turn>`.

        Args:
            spell_t: the teacher's `ByteEncoder.spell`.
            roles: (student ids, teacher ids) of control tokens with one meaning, such as both stop sets.
            reverse: rule 3; it needs `spell_s`.
        """
        if reverse and spell_s is None:
            raise VocabularyError("reverse=True spells teacher tokens with the student's tokenizer: pass spell_s.")
        if student.same_as(teacher):
            ids, weights = _identity(student, teacher)
        else:
            ids, weights = _split(student, teacher, spell_t)
            _match_controls(ids, weights, student, teacher, roles)
            if reverse and spell_s is not None:
                _add_reverse(ids, weights, student, teacher, spell_t, spell_s)
            ids, weights = _normalised(ids, weights)
        rules = {
            "slots": SLOTS,
            "first": FIRST,
            "decay": DECAY,
            "reverse": REVERSE if reverse else None,
            "roles": [[list(map(int, side)) for side in role] for role in roles],
        }
        return cls(
            ids, weights.astype(np.float32), len(teacher), student.content_hash, teacher.content_hash, rules=rules
        )

    def check(self, student: Vocabulary, teacher: Vocabulary) -> None:
        """Raise `VocabularyError` unless W was made for these two vocabularies."""
        for side, made_for, vocabulary in (("student", self.student, student), ("teacher", self.teacher, teacher)):
            if made_for != vocabulary.content_hash:
                raise VocabularyError(
                    f"This projection was made for another {side}: its vocabulary has hash {made_for}, the one given "
                    f"{vocabulary.content_hash}. Build a projection for this pair, or name the folder of the right one."
                )

    def fitted(self, size_s: int, size_t: int) -> Projection:
        """The same for embeddings with more or fewer padding rows."""
        ids = np.full((size_s, SLOTS), -1, dtype=np.int64)
        weights = np.zeros((size_s, SLOTS), dtype=np.float32)
        rows = min(size_s, len(self.ids))
        ids[:rows], weights[:rows] = self.ids[:rows], self.weights[:rows]
        return Projection(ids, weights, size_t, self.student, self.teacher, self.rules)

    def entries(self) -> tuple[Ints, Ints, NDArray[np.float32]]:
        """Student id, teacher id and weight of every non-zero, `[E]` each, ascending by student id."""
        row, slot = np.nonzero(self.ids >= 0)
        return row.astype(np.int64, copy=False), self.ids[row, slot], self.weights[row, slot]

    def save(self, folder: str | Path) -> None:
        """Write the arrays, and a record of what they belong to, into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, NDArray[Any]] = {
            "ids": np.ascontiguousarray(self.ids),
            "weights": np.ascontiguousarray(self.weights),
        }
        raw = safetensors.numpy.save(arrays)
        record = {
            "format": _FORMAT,
            "student": self.student,
            "teacher": self.teacher,
            "shape": [len(self.ids), self.size_t],
            "rules": dict(self.rules),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
        (folder / _ARRAYS).write_bytes(raw)
        (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, student: Vocabulary, teacher: Vocabulary) -> Projection:
        """What `save` wrote, for these vocabularies. `VocabularyError` for other ones, or if a file is damaged."""
        folder = Path(folder)
        record, raw = _read(folder)
        try:
            arrays = safetensors.numpy.load(raw)
            shape, hashes = record["shape"], (record["student"], record["teacher"])
            projection = cls(arrays["ids"], arrays["weights"], int(shape[1]), *hashes, rules=record["rules"])
        except (safetensors.SafetensorError, KeyError, TypeError, IndexError, ValueError) as error:
            raise VocabularyError(
                f"The projection in {folder} is damaged ({error}): build and save it anew."
            ) from error
        projection.check(student, teacher)
        return projection.fitted(len(student), len(teacher))


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The record and the bytes of the arrays, which fit each other."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        raw = (folder / _ARRAYS).read_bytes()
    except OSError as error:
        raise VocabularyError(
            f"No projection can be read from {folder} ({error}): it takes {_ARRAYS} and {_RECORD}, as Projection.save "
            "writes them."
        ) from error
    except ValueError as error:
        raise VocabularyError(
            f"{folder / _RECORD} is damaged ({error}): build and save the projection anew."
        ) from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        seen = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise VocabularyError(f"{folder / _RECORD} has format {seen!r}, this version reads {_FORMAT}: build it again.")
    digest = hashlib.sha256(raw).hexdigest()
    if record.get("sha256") != digest:
        raise VocabularyError(
            f"{folder / _ARRAYS} is damaged: its SHA-256 is {digest}, the record says {record.get('sha256')}. Build "
            "and save the projection anew."
        )
    return record, raw


def _problem(ids: NDArray[Any], weights: NDArray[Any], size_t: int) -> str:
    """What is wrong with the arrays of a projection; empty if nothing is."""
    if ids.shape != weights.shape or ids.ndim != 2 or ids.shape[1] != SLOTS:
        return f"ids have shape {ids.shape} and weights {weights.shape}, expected [V_s, {SLOTS}] twice"
    if ids.dtype != np.int64 or weights.dtype != np.float32:
        return f"ids are {ids.dtype} and weights {weights.dtype}, expected int64 and float32"
    used = ids >= 0
    if ids.min(initial=-1) < -1 or ids.max(initial=-1) >= size_t:
        return f"its ids go from {ids.min()} to {ids.max()}"
    # Written so that NaN fails too.
    if not ((weights > 0) == used).all() or not np.isfinite(weights).all() or (weights < 0).any():
        return "a weight is negative, not finite, zero in a used slot or not zero in an empty one"
    sums = weights.sum(1, dtype=np.float64)[used.any(1)]
    if (np.abs(sums - 1) > 1e-6).any():
        return f"a row sums to {sums[np.abs(sums - 1).argmax()]}, expected 1"
    return ""


def _by_bytes(tokens: list[bytes], spell: Speller) -> dict[bytes, int]:
    """Bytes -> id. Where several ids have the same bytes: the one that the tokenizer writes, else the lowest."""
    id_of: dict[bytes, int] = {}
    ambiguous: set[bytes] = set()
    for i, raw in enumerate(tokens):
        if raw and id_of.setdefault(raw, i) != i:
            ambiguous.add(raw)
    for raw, ids in zip(sorted(ambiguous), spell(sorted(ambiguous)), strict=True):
        if ids is not None and len(ids) == 1 and tokens[ids[0]] == raw:
            id_of[raw] = ids[0]
    return id_of


def _pieces(wanted: list[bytes], tokens: list[bytes], ids_of: dict[bytes, int], spell: Speller) -> Ints:
    """The first four of the other side's tokens that each of `wanted` is written with, `[n, 4]`, filled up with -1."""
    pieces = np.full((len(wanted), SLOTS), -1, dtype=np.int64)
    longest = max(map(len, ids_of), default=0)
    for i, (raw, ids) in enumerate(zip(wanted, spell(wanted), strict=True)):
        if ids is None or b"".join([tokens[j] for j in ids]) != raw:  # no text, or changed, be it only at an edge
            ids = _greedy(raw, ids_of, longest)
        pieces[i, : min(len(ids), SLOTS)] = ids[:SLOTS]
    return pieces


def _greedy(raw: bytes, ids_of: dict[bytes, int], longest: int) -> list[int]:
    """Longest tokens first, from the left; nothing if that gets stuck."""
    ids: list[int] = []
    at = 0
    while at < len(raw):
        for stop in range(min(at + longest, len(raw)), at, -1):
            if raw[at:stop] in ids_of:
                ids.append(ids_of[raw[at:stop]])
                at = stop
                break
        else:
            return []
    return ids


def _identity(student: Vocabulary, teacher: Vocabulary) -> tuple[Ints, NDArray[Any]]:
    ids = np.full((len(student), SLOTS), -1, dtype=np.int64)
    known = ~student.control
    known[[i for i in student.names if i < len(teacher)]] = True
    at = np.flatnonzero(known)
    ids[at, 0] = at
    return ids, (ids >= 0).astype(np.float64)


def _split(student: Vocabulary, teacher: Vocabulary, spell_t: Speller) -> tuple[Ints, NDArray[Any]]:
    """Rules 1 and 2."""
    tokens_s, tokens_t = student.tokens(), teacher.tokens()
    ids_of = _by_bytes(tokens_t, spell_t)
    ids = np.full((len(student), SLOTS), -1, dtype=np.int64)
    ids[:, 0] = [ids_of.get(raw, -1) for raw in tokens_s]
    rest = np.flatnonzero((ids[:, 0] < 0) & (student.lengths > 0))
    ids[rest] = _pieces([tokens_s[i] for i in rest.tolist()], tokens_t, ids_of, spell_t)
    return ids, np.where(ids >= 0, FIRST * DECAY ** np.arange(SLOTS), 0.0)


def _match_controls(
    ids: Ints,
    weights: NDArray[Any],
    student: Vocabulary,
    teacher: Vocabulary,
    roles: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> None:
    """Rule 4. A role's weight is spread evenly over the first four of its teacher ids. The first role counts."""
    id_of_name = {name: i for i, name in sorted(teacher.names.items(), reverse=True)}
    matched = {i: [id_of_name[name]] for i, name in student.names.items() if name in id_of_name}
    for of_student, of_teacher in reversed(list(roles)):
        matched.update({int(i): sorted(map(int, of_teacher))[:SLOTS] for i in of_student if of_teacher})
    for i, others in matched.items():
        if student.control[i]:
            ids[i, : len(others)], weights[i, : len(others)] = others, 1.0


def _add_reverse(
    ids: Ints, weights: NDArray[Any], student: Vocabulary, teacher: Vocabulary, spell_t: Speller, spell_s: Speller
) -> None:
    """Rule 3."""
    tokens_s, tokens_t = student.tokens(), teacher.tokens()
    ids_of = _by_bytes(tokens_t, spell_t)
    named = set(ids[ids >= 0].tolist())
    missing = [raw for raw, i in ids_of.items() if i not in named]
    first = _pieces(missing, tokens_s, _by_bytes(tokens_s, spell_s), spell_s)[:, 0].tolist()
    best: dict[int, bytes] = {}
    for raw, row in sorted(zip(missing, first, strict=True), key=lambda item: (len(item[0]), item[0])):
        if row >= 0:
            best.setdefault(row, raw)
    rows = np.fromiter(best, dtype=np.int64, count=len(best))
    weights[rows, -1] = 0.0
    others = weights[rows].sum(1, keepdims=True)
    weights[rows] *= np.divide(1 - REVERSE, others, out=np.zeros_like(others), where=others > 0)
    ids[rows, -1], weights[rows, -1] = [ids_of[raw] for raw in best.values()], REVERSE


def _normalised(ids: Ints, weights: NDArray[Any]) -> tuple[Ints, NDArray[Any]]:
    """Equal ids of a row added up, every non-empty row of sum 1, heaviest first."""
    for later in range(1, SLOTS):
        for earlier in range(later):
            again = (ids[:, later] == ids[:, earlier]) & (ids[:, later] >= 0)
            weights[again, earlier] += weights[again, later]
            ids[again, later], weights[again, later] = -1, 0.0
    order = np.argsort(-weights, axis=1, kind="stable")
    ids, weights = np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)
    total = weights.sum(1, keepdims=True)
    return ids, np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
