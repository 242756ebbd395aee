"""Strings short enough to count: tiny models whose distribution over all texts is known exactly.

A text is up to `LENGTH` letters, then stop. `Trie` holds token paths that spell such texts, `path_log_probs` runs a
model once over every node of it: a token costs one position, whatever the number of paths through it. Summed over all
paths of a text, canonical or not, that is the model's distribution over texts. Nothing of Diglot is used here.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from diglot.heads import cache_argument

STOP = 0
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Texts:
    """All texts of up to `length` letters, shortest first, behind each of some prompts."""

    letters: str = "abc"
    length: int = 6
    prompts: tuple[str, ...] = ("aa", "ab", "b", "c")

    @property
    def strings(self) -> list[str]:
        """Every text there is."""
        lengths = range(self.length + 1)
        return ["".join(s) for n in lengths for s in itertools.product(self.letters, repeat=n)]

    def random_distribution(self, seed: int, memory: int = 3) -> Floats:
        """`[prompts, strings]`: what follows is drawn anew (Dirichlet over the letters and stop) for every `memory`
        letters before it, prompt included; at `length` it stops."""
        draw = np.random.default_rng(seed)
        strings = self.strings
        out = np.zeros((len(self.prompts), len(strings)))
        after: dict[str, list[float]] = {}
        for prompt, row in zip(self.prompts, out, strict=True):
            mass = {"": 1.0}
            for i, text in enumerate(strings):
                before = (prompt + text)[-memory:]
                if before not in after:
                    after[before] = draw.dirichlet([0.5] * len(self.letters) + [0.35]).tolist()
                *go_on, stop = after[before]
                ends = len(text) == self.length
                row[i] = mass[text] * (1.0 if ends else stop)
                if not ends:
                    mass |= {text + c: mass[text] * p for c, p in zip(self.letters, go_on, strict=True)}
        return out


def bpe(merges: str, letters: str = "abc") -> PreTrainedTokenizerFast:
    """A byte-level BPE of `letters` and merges such as `"a+b ab+c"`, in that order; id 0 is stop."""
    pairs = [(left, right) for left, right in (merge.split("+") for merge in merges.split())]
    pieces = dict.fromkeys(["<stop>", *letters, *(left + right for left, right in pairs)])
    made = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<stop>", pad_token="<stop>")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """The canonical tokens of a text."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


class Trie:
    """Token paths as a tree, level by level: `levels[d]` holds the parents in the level above, and the tokens."""

    def __init__(self, paths: Sequence[tuple[int, ...]]) -> None:
        nodes = sorted({path[:n] for path in paths for n in range(len(path) + 1)}, key=lambda path: (len(path), path))
        self.paths = nodes
        self.levels: list[tuple[Tensor, Tensor]] = []
        above = {(): 0}
        for _, group in itertools.groupby(nodes[1:], len):
            level = list(group)
            parents, tokens = [above[path[:-1]] for path in level], [path[-1] for path in level]
            self.levels.append((torch.tensor(parents), torch.tensor(tokens)))
            above = {path: i for i, path in enumerate(level)}

    @classmethod
    def of_all(cls, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Trie:
        """Every path that spells a text, canonical or not."""
        pieces = {i: piece for piece, i in tokenizer.get_vocab().items() if i != STOP}
        paths, todo = [], [((), 0)]
        while todo:
            path, length = todo.pop()
            paths.append(path)
            more = ((i, length + len(piece)) for i, piece in pieces.items())
            todo += [((*path, i), reach) for i, reach in more if reach <= texts.length]
        return cls(paths)


def path_log_probs(model: Any, prompts: Sequence[Sequence[int]], trie: Trie) -> Tensor:
    """Log-prob of every path of the trie and a stop behind it, in nats, `[prompts, paths]`; has a gradient."""
    count, width, name = len(prompts), max(map(len, prompts)), cache_argument(model)
    ids = torch.tensor([[STOP] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    place = mask.sum(-1, keepdim=True)
    out = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=True)
    rows, log_probs, size = out.logits[:, -1:].float().log_softmax(-1), torch.zeros(count, 1), 1
    per_level = [rows[..., STOP]]
    for parents, tokens in trie.levels:
        chosen = (torch.arange(count)[:, None] * size + parents).flatten()
        log_probs = log_probs[:, parents] + rows[:, parents, tokens]
        cache = getattr(out, name)
        cache.reorder_cache(chosen)
        mask = torch.cat([mask[chosen], torch.ones(len(chosen), 1, dtype=mask.dtype)], -1)
        place, size = place[chosen], len(parents)
        out = model(
            input_ids=tokens.repeat(count)[:, None],
            attention_mask=mask,
            position_ids=place,
            use_cache=True,
            **{name: cache},
        )
        place = place + 1
        rows = out.logits[:, -1].float().log_softmax(-1).view(count, size, -1)
        per_level.append(log_probs + rows[..., STOP])
    return torch.cat(per_level, -1)


class Reader:
    """Reads a model's exact distribution over `texts` through one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        strings = {text: i for i, text in enumerate(texts.strings)}
        self.prompts = [encode(tokenizer, prompt) for prompt in texts.prompts]
        canonical = [encode(tokenizer, text) for text in strings]
        self.canonical, self.all = canonical, Trie.of_all(tokenizer, texts)
        self.text_of = np.array([strings[self._spell(path)] for path in self.all.paths])
        self.is_canonical = np.array(
            [canonical[i] == path for path, i in zip(self.all.paths, self.text_of, strict=True)]
        )

    def _spell(self, path: tuple[int, ...]) -> str:
        return "".join(self.tokenizer.convert_ids_to_tokens(list(path)))

    def canonical_log_probs(self, model: Any, which: NDArray[np.intp]) -> Tensor:
        """Log-prob of the canonical tokens of some texts and stop, `[prompts, texts]`; has a gradient."""
        paths = [self.canonical[i] for i in which]
        trie = Trie(paths)
        place = {path: i for i, path in enumerate(trie.paths)}
        return path_log_probs(model, self.prompts, trie)[:, [place[path] for path in paths]]

    @torch.no_grad()
    def distribution(self, model: Any) -> tuple[Floats, float]:
        """`[prompts, strings + 1]`, summed over all paths, the last column being everything longer; and the mean mass
        of canonical paths."""
        mass = path_log_probs(model, self.prompts, self.all).double().exp().numpy()
        out = np.zeros((len(mass), len(self.texts.strings) + 1))
        for row, of_paths in zip(out, mass, strict=True):
            np.add.at(row, self.text_of, of_paths)
        out[:, -1] = np.maximum(1 - out.sum(-1), 1e-12)
        return out, float(mass[:, self.is_canonical].sum(-1).mean())


def kl(p: Floats, q: Floats) -> float:
    """KL(p || q) in nats per text, the mean over prompts."""
    terms = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0.0)
    return float(terms.sum(-1).mean())


def tiny_llama(tokenizer: PreTrainedTokenizerBase, seed: int, **config: Any) -> LlamaForCausalLM:
    """Two layers of width 48 in float32 with random weights."""
    torch.manual_seed(seed)
    options = dict(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=STOP,
        pad_token_id=STOP,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(LlamaConfig(**{**options, **config})).eval()


def fit(model: Any, reader: Reader, wanted: Floats, steps: int, seed: int, rate: float = 6e-3) -> None:
    """Fit the canonical tokens of texts to `wanted`, `[prompts, strings]`, by expected cross-entropy.

    A step reads a fifth of all texts, at least 100, likely ones more often, and divides each by the probability that
    it was read: the expected gradient is that of all texts.
    """
    target = torch.tensor(wanted / wanted.sum(-1, keepdims=True), dtype=torch.float32)
    often = wanted.mean(0) ** 0.5
    share = max(len(often) / 5, 100) * (0.7 * often / often.sum() + 0.3 / len(often))
    often = np.minimum(1.0, share) if len(often) > 100 else np.ones_like(often)
    draw = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 20) * (1 - i / steps) ** 2)
    model.train()
    for _ in range(steps):
        read = np.flatnonzero(draw.random(len(often)) < often)
        weight = target[:, read] / torch.tensor(often[read], dtype=torch.float32)
        loss = -(weight * reader.canonical_log_probs(model, read)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def recipe_digest(recipe: Any, *made_by: Any) -> str:
    """A name for what is made from `recipe` (JSON) by these functions and classes; their layout does not matter."""
    code = [ast.dump(ast.parse(textwrap.dedent(inspect.getsource(maker)))) for maker in made_by]
    return hashlib.sha256(json.dumps([recipe, code]).encode()).hexdigest()[:24]


def fitted(
    tokenizer: PreTrainedTokenizerBase, texts: Texts, wanted: Floats, steps: int, seed: int, folder: Path | None
) -> tuple[LlamaForCausalLM, Floats, float]:
    """A tiny model fitted to `wanted`, its own exact distribution and its canonical mass; kept in `folder` under a
    name that holds everything it was made from."""
    reader = Reader(tokenizer, texts)
    recipe = (tokenizer.backend_tokenizer.to_str(), repr(texts), wanted.tobytes().hex(), steps, seed)
    name = recipe_digest(recipe, fit, tiny_llama, path_log_probs, Trie)
    model = tiny_llama(tokenizer, seed)
    place = folder / f"{name}.pt" if folder else None
    if place and place.exists():
        saved = torch.load(place, weights_only=True)
        model.load_state_dict(saved["weights"])
        return model, saved["distribution"].numpy(), saved["canonical"]
    fit(model, reader, wanted, steps, seed)
    distribution, canonical = reader.distribution(model)
    if place:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}")
        torch.save(
            {"weights": model.state_dict(), "distribution": torch.tensor(distribution), "canonical": canonical}, part
        )
        part.replace(place)
    return model, distribution, canonical
