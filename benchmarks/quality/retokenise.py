"""The same model behind another tokenizer: its own, with ids shuffled and some merges taken away.

With ids shuffled alone the model is the same function of texts, and cuts them alike; what is trained through the
general path shows what that path costs. With merges taken away it cuts text into more tokens, of which every one has
the embedding that it had: a student with a tokenizer truly unlike its teacher's, and with its teacher's kin.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .declaration import DeclarationError


def retokenise(source: Path, target: Path, shuffle: int, drop: float) -> None:
    """Write the model of `source` with its new tokenizer into `target`.

    Args:
        shuffle: seed of the new order of ids, and of which merges go.
        drop: share of merges that are taken away, in [0, 1); what was built on them goes with them, and with it the
            pieces that nothing writes any more.

    Raises:
        DeclarationError: the tokenizer is no BPE.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    old_of = _rewrite(description, shuffle, drop, model.get_input_embeddings().num_embeddings)
    tokenizer.save_pretrained(target)
    (target / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=False), encoding="utf-8")
    _forget_ids(target / "tokenizer_config.json")
    _take_rows(model, old_of)
    model.save_pretrained(target)


def _rewrite(description: dict[str, Any], seed: int, drop: float, rows: int) -> list[int]:
    """Change the tokenizer's description; returns the old id of each new one, rows that no token has left out."""
    model = description["model"]
    if model["type"] != "BPE":
        raise DeclarationError(f"retokenise needs a BPE, and the student's tokenizer is {model['type']}.")
    draw = random.Random(seed)
    vocabulary: dict[str, int] = model["vocab"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    gone: set[str] = set()
    left = []
    for one, other in merges:  # in order of rank: a merge's parts were written by merges before it
        if one in gone or other in gone or draw.random() < drop:
            gone.add(one + other)
        else:
            left.append((one, other))
    gone -= {one + other for one, other in left}  # written by another merge as well
    left = [(one, other) for one, other in left if not {one, other, one + other} & gone]
    pieces = [piece for piece in vocabulary if piece not in gone]
    added = {entry["content"]: entry["id"] for entry in description["added_tokens"] if entry["id"] < rows}
    old = {**{piece: vocabulary[piece] for piece in pieces}, **added}
    names = sorted(old, key=lambda name: old[name])
    draw.shuffle(names)
    new = {name: i for i, name in enumerate(names)}
    model["vocab"] = {piece: new[piece] for piece in pieces}
    model["merges"] = [list(merge) for merge in left]
    model["ignore_merges"] = False
    description["added_tokens"] = sorted(
        ({**entry, "id": new[entry["content"]]} for entry in description["added_tokens"] if entry["content"] in new),
        key=lambda entry: entry["id"],
    )
    _rename(description.get("post_processor"), new)
    return [old[name] for name in names]


def _rename(part: Any, new: dict[str, int]) -> None:
    """Ids of special tokens inside a template processor."""
    if isinstance(part, dict):
        for name, entry in (part.get("special_tokens") or {}).items():
            entry["ids"] = [new[token] for token in entry.get("tokens", [name])]
        for one in part.get("processors", []):
            _rename(one, new)


def _forget_ids(path: Path) -> None:
    """Old ids of added tokens in the tokenizer's config would be taken for new ones."""
    if path.exists():
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("added_tokens_decoder", None)
        path.write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")


def _take_rows(model: PreTrainedModel, old_of: list[int]) -> None:
    """Embedding and head row by row in the new order; ids in the configs follow."""
    new_of = {old: new for new, old in enumerate(old_of)}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    weights = [
        part.weight.detach()[old_of].clone() for part in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    model.resize_token_embeddings(len(old_of), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(weights[0])
        if not tied:
            model.get_output_embeddings().weight.copy_(weights[1])
    configs = {id(one): one for one in (model.config, model.config.get_text_config(), model.generation_config)}
    for config in configs.values():  # the first two may be one
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(config, name, None)
            if ids is not None:
                many = [new_of[i] for i in (ids if isinstance(ids, list) else [ids]) if i in new_of]
                setattr(config, name, many if isinstance(ids, list) else next(iter(many), None))
