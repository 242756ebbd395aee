"""Private copies of a `tokenizers` backend that encode text as a continuation or from its start.

The user's own is never changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerBase

from diglot.vocabulary.kinds import component, keeps_word_prefix

Part = dict[str, Any]  # a component in tokenizer.json
Change = Callable[[Part], Part | None]

_EMPTY: Part = {"type": "BPE", "vocab": {}, "merges": []}
_MOST_RUNS = 32  # of added tokens: each one makes the library build its matcher again


class Spans:
    """Tokens of one text, in order: their ids, and the characters `[start, stop)` of the text that each came from."""

    def __init__(self, ids: list[int], offsets: Callable[[], list[tuple[int, int]]]) -> None:
        self.ids, self._offsets = ids, offsets

    def characters(self) -> tuple[list[int], list[int]]:
        """Starts and stops. Made when they are asked for: where the bytes fit, nobody does."""
        starts, stops = zip(*self._offsets(), strict=True) if self.ids else ((), ())
        return list(starts), list(stops)


class BackendEncoder:
    """Encodes with private copies of a `tokenizers` backend: some know the special tokens and some do not.

    All have no truncation, no padding and no dropout. Those for a continuation have no dummy prefix either; those for
    the start of a text are as the tokenizer itself. The copies use the user's own model, which is nearly all of a
    tokenizer, where nothing has to be changed in it; so do not give it a dropout later.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Mapping[int, str]) -> None:
        """
        Args:
            tokenizer: left as it is.
            names: control id -> name, all of which must stay out of reach for text, but for the unknown token.
        """
        backend = tokenizer.backend_tokenizer
        self._post_processor = backend.post_processor
        model = backend.model if _can_share(backend, names) else None
        shared = model is not None and _never_writes(model, names)
        whole = _whole(_around(backend) if shared else json.loads(backend.to_str()))
        self._inside = _Copies(_without_edges(whole), names, model, shared)
        self.has_edges = any(whole[part] != _without_edges(whole)[part] for part in ("normalizer", "pre_tokenizer"))
        self._at_start = _Copies(whole, names, model, shared) if self.has_edges else self._inside

    def spans(self, texts: Sequence[str], *, start: bool = False) -> list[Spans]:
        """Encode as text, special tokens spelt out; as a continuation, or as the start of a text."""
        plain = (self._at_start if start else self._inside).plain
        encodings = plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [Spans(one.ids, partial(_offsets, plain, text)) for text, one in zip(texts, encodings, strict=True)]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text as a continuation, special tokens spelt out."""
        encodings = self._inside.plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encodings]

    def markup(self, text: str, *, start: bool = False) -> Spans:
        """Encode with special tokens recognised and nothing added."""
        encoding = (self._at_start if start else self._inside).with_specials.encode(text, add_special_tokens=False)
        return Spans(encoding.ids, lambda: encoding.offsets)

    def bos_ids(self) -> list[int]:
        """The ids that the tokenizer's own post-processor puts before plain text."""
        if self._post_processor is None:
            return []
        encoding = self._post_processor.process(self._inside.plain.encode("a", add_special_tokens=False))
        added = encoding.special_tokens_mask
        return encoding.ids[: added.index(0)] if 0 in added else []


class _Copies:
    """Two copies of one tokenizer: one spells special tokens out, the other one recognises them."""

    def __init__(self, spec: Part, names: Mapping[int, str], model: Any, shared: bool) -> None:
        hidden = {} if shared else _reachable(spec["model"], names)
        self.plain = _build(_without_specials(spec, names, hidden), model if shared else None)
        self.plain.encode_special_tokens = True
        # A copy of its own, though often one switch is all the difference: another thread may be encoding meanwhile.
        self.with_specials = _build(spec, model)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickle, where the library loses the switch: texts that spell special tokens would be read as those."""
        self.__dict__.update(state)
        self.plain.encode_special_tokens = True


def _offsets(tokenizer: tokenizers.Tokenizer, text: str) -> list[tuple[int, int]]:
    offsets: list[tuple[int, int]] = tokenizer.encode(text, add_special_tokens=False).offsets
    return offsets


def _build(spec: Part, model: Any = None) -> tokenizers.Tokenizer:
    """The tokenizer of this description, around `model` (shared, not copied) if one is given."""
    if model is None:
        return tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    built = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": [], "model": _EMPTY}))
    built.model = model
    # In order, as `from_str` adds them, since a token that the model lacks gets the next free id.
    for special, tokens in groupby(spec["added_tokens"], key=lambda token: token["special"]):
        add = built.add_special_tokens if special else built.add_tokens
        add([tokenizers.AddedToken(**{key: token[key] for key in token if key != "id"}) for token in tokens])
    return built


def _around(backend: tokenizers.Tokenizer) -> Part:
    """The description of all of a tokenizer but its model, of which an empty one takes the place."""
    added = sorted(backend.get_added_tokens_decoder().items())
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, **token.__getstate__()} for i, token in added],
        "normalizer": component(backend.normalizer),
        "pre_tokenizer": component(backend.pre_tokenizer),
        "decoder": component(backend.decoder),
        "model": _EMPTY,
    }


def _can_share(backend: tokenizers.Tokenizer, names: Mapping[int, str]) -> bool:
    """May a copy use the tokenizer's own model: nothing in it is left to chance, and its tokens are soon added?"""
    added = sorted(backend.get_added_tokens_decoder().items())
    runs = groupby(added, key=lambda item: (item[1].special, item[0] in names))
    return not getattr(backend.model, "dropout", None) and len(list(runs)) <= _MOST_RUNS


def _never_writes(model: Any, names: Mapping[int, str]) -> bool:
    """Does the model write none of the control tokens from its text, whatever it stands in? False if that is not sure.

    A BPE merges inside a token as it merges the token's text alone, so one look at each name tells. With marks on a
    word's first or last piece that is not so. Other models write every piece that they have.
    """
    if type(model) is not tokenizers.models.BPE or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    own = {i: name for i, name in names.items() if model.token_to_id(name) == i and name != model.unk_token}
    return all([token.id for token in model.tokenize(name)] != [i] for i, name in own.items())


def _whole(spec: Part) -> Part:
    """The tokenizer without what a text's length or chance would change."""
    # The post-processor goes too: that of ByteLevel trims the spaces off the offsets.
    copy = {**spec, "truncation": None, "padding": None, "post_processor": None}
    copy["model"] = {**spec["model"]}
    if "dropout" in copy["model"]:
        copy["model"]["dropout"] = None
    return copy


def _without_edges(spec: Part) -> Part:
    """The tokenizer without what a text's start would change."""
    copy = {**spec}
    copy["normalizer"] = _rewrite(spec["normalizer"], lambda step: None if step["type"] == "Prepend" else step)
    if not keeps_word_prefix(spec["pre_tokenizer"]):
        copy["pre_tokenizer"] = _rewrite(spec["pre_tokenizer"], _never_prefix)
    return copy


def _never_prefix(step: Part) -> Part:
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step


def _rewrite(component: Part | None, change: Change) -> Part | None:
    """The component with every single step changed; a step for which `change` gives None is left out."""
    if component is None or component["type"] != "Sequence":
        return component and change(component)
    key = "normalizers" if "normalizers" in component else "pretokenizers"
    children = [_rewrite(child, change) for child in component[key]]
    return {**component, key: [child for child in children if child is not None]}


def _without_specials(spec: Part, names: Mapping[int, str], hidden: dict[str, str]) -> Part:
    """The tokenizer in a form in which no text reaches a control token.

    `encode_special_tokens` keeps the added-token matcher from finding those marked special, so all control tokens are
    marked. Those that the model itself could write (`hidden`) get names that no text has.
    """
    added = [
        {
            **token,
            "special": token["special"] or token["id"] in names,
            "content": hidden.get(token["content"], token["content"]),
        }
        for token in spec["added_tokens"]
    ]
    return {**spec, "added_tokens": added, "model": _rename(spec["model"], hidden) if hidden else spec["model"]}


def _reachable(model: Part, names: Mapping[int, str]) -> dict[str, str]:
    """The control tokens that the model may write from their text, without any matcher -> a name that no text has.

    BPE reaches a token by a merge, as a single character, or as a whole word if it ignores merges; every other model
    reaches each of its pieces. The unknown token stays: the model needs it.
    """
    unk_id = model.get("unk_id")
    unk = model.get("unk_token") if unk_id is None else model["vocab"][unk_id][0]
    own = _ids(model)
    reachable = {name for i, name in names.items() if own.get(name) == i and name != unk}
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        skip = len(model.get("continuing_subword_prefix") or "")
        merged = {left + right[skip:] for left, right in model["merges"]}
        reachable = {name for name in reachable if name in merged or len(name) == 1}
    return {name: f"\U0010fffe{own[name]}\U0010ffff" for name in reachable}


def _ids(model: Part) -> Mapping[str, int]:
    """Piece -> id of the model's own vocabulary."""
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def _rename(model: Part, hidden: dict[str, str]) -> Part:
    """The model with the tokens in `hidden` renamed, and without the merges that make or use them."""
    if isinstance(model["vocab"], list):
        return {**model, "vocab": [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]}
    copy = {**model, "vocab": {hidden.get(piece, piece): token_id for piece, token_id in model["vocab"].items()}}
    if model.get("merges"):
        skip = len(model.get("continuing_subword_prefix") or "")
        copy["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left + right[skip:] not in hidden and left not in hidden and right not in hidden
        ]
    return copy
