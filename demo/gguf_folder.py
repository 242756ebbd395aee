"""From a GGUF file to an ordinary transformers folder: safetensors, config, tokenizer.

What transformers itself does with `from_pretrained(..., gguf_file=...)`, with the same weights, in seconds instead of
minutes: the header is read once, by the forty lines below. Covers the three architectures of the demo's models.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens in the file, beside ordinary text

# How GPT-2's family of tokenizers cuts text before merging, by the name the file gives it. SmolLM2: single digits
# first, then GPT-2's own rule. Qwen2: the rule below, on text in NFC.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Header:
    """What stands before the weights."""

    fields: dict[str, Any]
    tensors: list[tuple[str, tuple[int, ...], int, int]]  # name, shape (outermost first), quantisation, offset
    data_start: int  # of the tensors, bytes from the start of the file

    @property
    def architecture(self) -> str:
        """ "llama", "qwen2" or "gemma3"."""
        return str(self.fields["general.architecture"])

    def __getitem__(self, key: str) -> Any:
        """A field of the architecture, for instance `block_count`."""
        return self.fields[f"{self.architecture}.{key}"]

    def get(self, key: str, default: Any) -> Any:
        """The same, or `default`."""
        return self.fields.get(f"{self.architecture}.{key}", default)


# ---- reading the file --------------------------------------------------------------------------------------------

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _scalar(file: BinaryIO, code: str, count: int = 1) -> tuple[Any, ...]:
    form = f"<{count}{code}"
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _string(file: BinaryIO) -> str:
    return file.read(_scalar(file, "Q")[0]).decode("utf-8", "surrogateescape")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        (inner,), (count,) = _scalar(file, "I"), _scalar(file, "Q")
        if inner == _STRING:
            return [_string(file) for _ in range(count)]
        return list(_scalar(file, _SCALARS[inner], count))
    return _scalar(file, _SCALARS[kind])[0]


def read_header(path: Path) -> Header:
    """Fields and table of tensors of a GGUF file.

    Raises:
        ValueError: not a GGUF file.
    """
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(f"{path} begins with {magic!r}, expected b'GGUF'.")
        _scalar(file, "I")  # version
        num_tensors, num_fields = _scalar(file, "Q", 2)
        fields = {}
        for _ in range(num_fields):
            key = _string(file)
            fields[key] = _value(file, _scalar(file, "I")[0])
        tensors = []
        for _ in range(num_tensors):
            name = _string(file)
            shape = _scalar(file, "Q", _scalar(file, "I")[0])
            tensors.append((name, shape[::-1], *_scalar(file, "I"), *_scalar(file, "Q")))
        unit = fields.get("general.alignment", 32)
        return Header(fields, tensors, -(-file.tell() // unit) * unit)


def read_tensors(path: Path, header: Header) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The weights, unpacked to float32, one at a time."""
    from gguf import GGMLQuantizationType
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    data = np.memmap(path, dtype=np.uint8, mode="r")
    for name, shape, code, offset in header.tensors:
        kind = GGMLQuantizationType(code)
        block, size = GGML_QUANT_SIZES[kind]
        start = header.data_start + offset
        raw = data[start : start + int(np.prod(shape)) // block * size]
        if kind == GGMLQuantizationType.F32:
            values = raw.view(np.float32).copy()  # the file is mapped read-only
        else:
            values = dequantize(raw.reshape(*shape[:-1], shape[-1] // block * size), kind)
        yield name, np.ascontiguousarray(values, dtype=np.float32).reshape(shape)


# ---- weights and config ------------------------------------------------------------------------------------------

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_INNER_GEMMA = {
    **_INNER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _weight_name(name: str, architecture: str) -> str:
    part, leaf = name.rsplit(".", 1)
    if part in _OUTER:
        return f"{_OUTER[part]}.{leaf}"
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", part):
        names = _INNER_GEMMA if architecture == "gemma3" else _INNER
        return f"model.layers.{match[1]}.{names[match[2]]}.{leaf}"
    raise ValueError(f"The file has a weight {name!r}, which this converter does not know.")


def _undo_rotary_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The file interleaves the two halves of each head's rotary dimensions; transformers keeps them apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def state_dict(path: Path, header: Header, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The weights under transformers' names. Input and output embeddings are one, as in the models upstream; where the
    file holds both, the output copy is kept, which is the finer one."""
    weights = {}
    for name, values in read_tensors(path, header):
        weight = torch.from_numpy(values)
        if header.architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = _undo_rotary_order(weight, header["attention.head_count" + ("_kv" if "attn_k" in name else "")])
        if header.architecture == "gemma3" and name.endswith("norm.weight"):
            weight = weight - 1  # the file stores 1 + w
        weights[_weight_name(name, header.architecture)] = weight.to(dtype).contiguous()
    if (head := weights.pop("lm_head.weight", None)) is not None:
        weights["model.embed_tokens.weight"] = head
    return weights


_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "gemma3": "Gemma3ForCausalLM"}


def config(header: Header) -> dict[str, Any]:
    """`config.json`."""
    heads, hidden = header["attention.head_count"], header["embedding_length"]
    head_dim = header.get("attention.key_length", hidden // heads)
    out = {
        "architectures": [_CLASSES[header.architecture]],
        "model_type": header.architecture,
        "hidden_size": hidden,
        "num_hidden_layers": header["block_count"],
        "intermediate_size": header["feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": header["attention.head_count_kv"],
        "rms_norm_eps": header["attention.layer_norm_rms_epsilon"],
        "vocab_size": len(header.fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": header["context_length"],
        "rope_theta": header["rope.freq_base"],
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        **special_ids(header),
    }
    if header.architecture != "qwen2":
        out["head_dim"] = head_dim
    if header.architecture == "gemma3":
        out |= {
            "model_type": "gemma3_text",
            "sliding_window": header["attention.sliding_window"],
            "query_pre_attn_scalar": head_dim,
            "rope_local_base_freq": 10000.0,
            "hidden_activation": "gelu_pytorch_tanh",
        }
    return out


def special_ids(header: Header) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, those that the file names."""
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    ids = {ours: header.fields.get(f"tokenizer.ggml.{theirs}") for ours, theirs in names.items()}
    return {name: i for name, i in ids.items() if i is not None}


def save_model(path: Path, header: Header, folder: Path) -> None:
    """Weights, `config.json` and `generation_config.json`; the tokenizer is saved apart."""
    from safetensors.torch import save_file

    save_file(state_dict(path, header), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(header), indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(special_ids(header), indent=2) + "\n")


# ---- tokenizer ---------------------------------------------------------------------------------------------------


def byte_level_tokenizer(header: Header) -> Any:
    """The file's byte-level BPE tokenizer (SmolLM2, Qwen2), with the rule for cutting text that goes with it.

    transformers, reading the same file, leaves out SmolLM2's single digits and Qwen2's NFC.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = header.fields
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    byte_level = pre_tokenizers.ByteLevel
    cut = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)],
        "qwen2": [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            byte_level(add_prefix_space=False, use_regex=False),
        ],
    }
    rule = fields["tokenizer.ggml.pre"]
    backend.pre_tokenizer = pre_tokenizers.Sequence(cut[rule])
    backend.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    for kind in (CONTROL, USER_DEFINED):
        chosen = [token for token, k in zip(tokens, types, strict=True) if k == kind]
        backend.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL) for token in chosen])
    names = {name.removesuffix("_id"): tokens[i] for name, i in special_ids(header).items()}
    if rule == "qwen2":
        names.pop("bos_token", None)  # the file has to name one; Qwen has none
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer
