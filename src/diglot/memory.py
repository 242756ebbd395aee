"""How much memory does a run take? Formulas over the shapes of both models; nothing is loaded, and torch is not needed.

One process without sharding. What the student keeps for its backward pass was counted on decoders of transformers
(Llama, Qwen3, Gemma 3, GPT-2) with `scaled_dot_product_attention`, and is proportional to the tokens; the formula is
never below it, and up to a sixth above. An allocator and the CUDA context come on top, about 10%.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

GIB = 2**30
LOGITS_BUDGET = 512 * 2**20  # bytes of one block of logits on the CPU; an eighth of what is free on a GPU

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float64": 8.0}
_QUANTISED = {4: 0.5625, 8: 1.0625}  # bytes of a weight with its scales
# Part of an optimizer's name -> bytes of its state for each trained weight; the first that fits.
_OPTIMIZERS = (
    ("4bit", 1.0), ("8bit", 2.0), ("adafactor", 0.0), ("lomo", 0.0), ("sgd", 0.0), ("lion", 4.0), ("adagrad", 4.0),
    ("rmsprop", 4.0), ("", 8.0),
)  # fmt: skip
# Bytes for each token and layer that a backward pass needs, per unit of hidden, intermediate, query and key width.
_SAVED = {4.0: (24.0, 16.0, 16.0, 16.0), 2.0: (26.0, 8.0, 12.0, 12.0)}
_LAST_NORM = 12.0  # of the hidden width, once
_MORE_NORMS = 16.0  # more of the hidden width where a layer has norms behind its blocks too
_NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "d_inner"),
    "heads": ("num_attention_heads", "n_head"),
    "key_heads": ("num_key_value_heads",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}


@dataclass(frozen=True)
class Shape:
    """A decoder as far as its memory matters.

    Args:
        parameters: all of them.
        hidden: width of the residual stream; `inner` that of the feed-forward part (of all experts of a token).
        queries: heads times their width; `keys` the same of keys, or of values.
        embedding: parameters of the input embedding, which no matrix product reads.
        itemsize: bytes of a weight in its file.
        many_norms: are there norms behind attention and feed-forward part as well (Gemma)?
    """

    parameters: float
    hidden: int
    layers: int
    inner: int
    queries: int
    keys: int
    vocabulary: int
    embedding: float
    itemsize: float = 4.0
    many_norms: bool = False

    @staticmethod
    def of_config(config: Mapping[str, Any], parameters: float | None = None, itemsize: float | None = None) -> Shape:
        """From what `config.json` holds. Without `parameters` they are counted as those of a decoder of this shape.

        Raises:
            KeyError: width, layers or vocabulary are missing.
        """
        inner_config = config.get("text_config")
        text = {**config, **inner_config} if isinstance(inner_config, Mapping) else config
        hidden, layers, vocabulary = _number(text, "hidden"), _number(text, "layers"), int(text["vocab_size"])
        heads = _number(text, "heads", 1)
        key_heads = _number(text, "key_heads", heads)
        width = int(text.get("head_dim") or hidden // heads)
        inner = _number(text, "inner", 4 * hidden)
        experts = _number(text, "experts", 0)
        one = int(text.get("moe_intermediate_size") or inner)
        active = one * int(text.get("num_experts_per_tok") or 1) if experts else inner
        queries, keys, embedding = heads * width, key_heads * width, vocabulary * hidden
        gated = 2 if any(name in text for name in ("n_embd", "ffn_dim")) else 3
        if parameters is None:
            layer = 2 * hidden * (queries + keys) + gated * hidden * (experts * one if experts else inner)
            parameters = layers * layer + embedding * (1 if text.get("tie_word_embeddings", True) else 2)
        stored = str(text.get("dtype") or text.get("torch_dtype") or "float32").removeprefix("torch.")
        itemsize = _BYTES.get(stored, 4.0) if itemsize is None else itemsize
        norms = "gemma" in str(text.get("model_type", "")) or "post_feedforward_layernorm" in text
        return Shape(parameters, hidden, layers, active, queries, keys, vocabulary, embedding, itemsize, norms)

    @staticmethod
    def of_size(parameters: float) -> Shape:
        """A model of which only the size is known: the nearest of the usual shapes, stretched to it; 16-bit files."""
        nearest = min(_USUAL, key=lambda shape: max(parameters / shape[0], shape[0] / parameters))
        size, hidden, layers, inner, queries, keys, vocabulary = nearest
        if not 0.4 < parameters / size < 2.5:  # beyond the ends of the table: as many times the layers
            layers = max(round(layers * parameters / size), 1)
        embedding = min(vocabulary * hidden, parameters / 2)
        return Shape(parameters, hidden, layers, inner, queries, keys, vocabulary, embedding, 2.0)

    def adapter(self, rank: int, modules: tuple[str, ...] | None = None) -> float:
        """Parameters of a LoRA adapter. `modules`: parts of their names; by default PEFT's, queries and values."""
        sides = {
            "q_proj": (self.hidden, self.queries), "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys), "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.inner), "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }  # fmt: skip
        names = modules or ("q_proj", "v_proj")
        chosen = sides if names == ("all-linear",) else {n: s for n, s in sides.items() if any(m in n for m in names)}
        return float(self.layers * rank * sum(a + b for a, b in (chosen or sides).values()))

    def weights(self, itemsize: float | None = None, bits: int | None = None) -> float:
        """Bytes of all weights; with `bits` (4 or 8) those of matrix products are quantised."""
        size = self.itemsize if itemsize is None else itemsize
        if bits is None:
            return size * self.parameters
        return _QUANTISED[bits] * (self.parameters - self.embedding) + size * self.embedding


# Parameters, hidden, layers, inner, queries, keys, vocabulary of models that are often used.
_USUAL = (
    (135e6, 576, 30, 1536, 576, 192, 49_152), (0.5e9, 896, 24, 4864, 896, 128, 151_936),
    (1.2e9, 2048, 16, 8192, 2048, 512, 128_256), (3e9, 3072, 28, 8192, 3072, 1024, 128_256),
    (8e9, 4096, 32, 14_336, 4096, 1024, 128_256), (14e9, 5120, 40, 17_408, 5120, 1024, 151_936),
    (32e9, 5120, 64, 25_600, 8192, 1024, 151_936), (70e9, 8192, 80, 28_672, 8192, 1024, 128_256),
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a step holds.

    Args:
        student: it, with `student_bytes` of all its weights as they are loaded.
        trained: parameters with gradients, each of `trained_itemsize` bytes.
        teachers: those in this process, each with the bytes of its weights.
        optimizer: bytes of its state for each trained parameter.
        texts: of a micro-batch; `sampled` those that are written in one call.
        length: tokens of the longest text, prompt and completion; `completion` those of the longest completion.
        compute: bytes of a number in the student's passes: 4, or 2 under autocast.
        checkpointing: are activations formed again in the backward pass?
    """

    student: Shape
    student_bytes: float
    trained: float
    teachers: tuple[tuple[Shape, float], ...] = ()
    trained_itemsize: float = 4.0
    optimizer: float = 8.0
    texts: int = 8
    sampled: int = 8
    length: int = 1024
    completion: int = 128
    compute: float = 4.0
    checkpointing: bool = False

    @property
    def parts(self) -> dict[str, float]:
        """Name -> bytes of what exists together at the peak of a step."""
        lasting = {
            "student's weights": self.student_bytes,
            "gradients": self.trained_itemsize * self.trained,
            "optimizer": self.optimizer * self.trained,
            "teacher's weights": sum(size for _, size in self.teachers),
        }
        training = {"activations": self.activations, "logits": self.logits}
        if self.compute == 2 and self.student_bytes > 3 * self.student.parameters:  # autocast of 32-bit weights
            training["16-bit copies"] = 2 * (self.student.parameters - self.student.embedding)
        writing = {"keys and values while sampling": self.keys_and_values}
        return lasting | (training if sum(training.values()) >= self.keys_and_values else writing)

    @property
    def total(self) -> float:
        """Bytes at the peak of a step."""
        return sum(self.parts.values())

    @property
    def activations(self) -> float:
        """Bytes that the student keeps for its backward pass, and the largest of what one layer of a teacher holds."""
        tokens, s = self.texts * self.length, self.student
        a, b, c, d = _SAVED[self.compute]
        layer = (a + _MORE_NORMS * s.many_norms) * s.hidden + b * s.inner + c * s.queries + d * s.keys
        saved = layer + 4 * s.hidden * s.layers if self.checkpointing else layer * s.layers
        saved += _LAST_NORM * s.hidden
        passing = max((4 * (2 * t.hidden + 3 * t.inner) for t, _ in self.teachers), default=0)
        return tokens * (saved + passing)

    @property
    def logits(self) -> float:
        """Bytes of one block of logits of both sides: what all scored rows would take, or the budget."""
        sizes = [self.student.vocabulary, *(t.vocabulary for t, _ in self.teachers)]
        return float(min(self.texts * self.completion * 4 * 2 * sum(sizes), LOGITS_BUDGET))

    @property
    def keys_and_values(self) -> float:
        """Bytes of the student's cache while it writes all texts of a window."""
        return self.sampled * self.length * self.student.layers * 2 * self.student.keys * self.compute

    def cheaper(self) -> list[tuple[str, Plan]]:
        """(option, plan with it) of what lowers the total by a twentieth or more, the greatest saving first."""
        half = max(self.texts // 2, 1)
        adapter = self.student.adapter(16)
        tried = [
            ("activation_checkpointing: true", replace(self, checkpointing=True)),
            (f"per_device_train_batch_size: {half}, twice the accumulation", replace(self, texts=half)),
            (f"max_length: {self.length // 2}", replace(self, length=self.length // 2)),
            ("bf16: true", replace(self, compute=2.0)),
            (
                "use_peft: true (LoRA on weights of 16 bits)",
                replace(self, trained=adapter, trained_itemsize=4.0, student_bytes=self.student.weights(2.0)),
            ),
            ("a teacher in 4 bits", replace(self, teachers=tuple((t, t.weights(2.0, 4)) for t, _ in self.teachers))),
            ("a teacher behind an address, or scores computed once", replace(self, teachers=())),
        ]
        saving = [(name, plan) for name, plan in tried if plan.total < 0.95 * self.total]
        return sorted(saving, key=lambda both: both[1].total)


def optimizer_bytes(name: str) -> float:
    """Bytes of an optimizer's state for each trained weight, by its name; one that is not known counts as AdamW."""
    return next(size for part, size in _OPTIMIZERS if part in name)


def itemsize(dtype: str) -> float:
    """Bytes of a number of this type, as `float32` or `torch.bfloat16`; 4 for one that is not known."""
    return _BYTES.get(dtype.removeprefix("torch."), 4.0)


def _number(config: Mapping[str, Any], what: str, default: int | None = None) -> int:
    for name in _NAMES[what]:
        if config.get(name):
            return int(config[name])
    if default is None:
        raise KeyError(" or ".join(_NAMES[what]))
    return default
