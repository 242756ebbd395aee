"""Chat templates of the styles in use, each on a small tokenizer that has its markers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import lru_cache

import support.tokenizers_zoo as zoo
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BODY = "{% for m in messages %}"
END = "{% endfor %}"
CHATML = BODY + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + END
GENERATE = "{% if add_generation_prompt %}"

HARMONY = (
    (
        BODY + "{% if m.role == 'assistant' %}"
        "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}<|start|>assistant to=functions.{{ c.function.name }}"
        "<|channel|>commentary json<|message|>{{ c.function.arguments | tojson }}<|call|>{% endfor %}"
        "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endif %}"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}" + END
    )
    + GENERATE
    + "<|start|>assistant{% endif %}"
)
THINKS = (
    (
        BODY + "{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
        "{% elif loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": '
        "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}"
        "{% endif %}}\n</tool_call>{% endfor %}<|im_end|>\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}" + END
    )
    + GENERATE
    + "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
STRIPS = (
    BODY + "{% if m.role == 'assistant' %}<a>{{ (m.content or '').split('</think>')[-1] }}<e>"
    "{% else %}<u>{{ m.content }}{% endif %}" + END + GENERATE + "<a><think>\n{% endif %}"
)
BRACKETS = (
    BODY + "{% if m.role == 'assistant' %}"
    "{% if m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}{{ c.function.name }}[ARGS]"
    "{{ c.function.arguments | tojson }}{% endfor %}"
    "{% else %}{% if m.reasoning %}[THINK]{{ m.reasoning }}[/THINK]{% endif %}{{ m.content }}{% endif %}{{ eos_token }}"
    "{% else %}[INST]{{ m.content }}[/INST]{% endif %}" + END
)

TEMPLATES: dict[str, str] = {
    "chatml": CHATML + GENERATE + "<|im_start|>assistant\n{% endif %}",
    "system by default": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    + CHATML
    + GENERATE
    + "<|im_start|>assistant\n{% endif %}",
    "harmony": HARMONY,
    "thinks": THINKS,
    "opens a think block": STRIPS,
    "brackets": BRACKETS,
    "spaced brackets": "{{ bos_token }}" + BODY + "{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}" + END,
    "headers": "{{ bos_token }}"
    + BODY
    + "<h>{{ m.role }}</h>\n\n{{ m.content | trim }}<e>"
    + END
    + GENERATE
    + "<h>assistant</h>\n\n{% endif %}",
    "turns": "{{ bos_token }}"
    + BODY
    + "<u>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<e>\n"
    + END
    + GENERATE
    + "<u>model\n{% endif %}",
    "words for markers": BODY
    + "{{ m.role | upper }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    + END
    + GENERATE
    + "ASSISTANT:{% endif %}",
    "spelt markers": BODY
    + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n"
    + END
    + GENERATE
    + "<|assistant|>\n{% endif %}",
    "swallowing markers": BODY
    + "{{ '<a>' if m.role == 'assistant' else '<u>' }}\n{{ m.content }}<e>\n"
    + END
    + GENERATE
    + "<a>\n{% endif %}",
    "response marker": BODY
    + "{% if m.role == 'assistant' %}<a><r>{{ m.content }}</r><e>{% else %}<u>{{ m.content }}<e>{% endif %}"
    + END
    + GENERATE
    + "<a>{% endif %}",
    "nothing between": BODY + "{{ m.content }}{{ eos_token }}" + END,
    "instruction": BODY + "{% if m.role == 'assistant' %}### Response:\n{{ m.content }}{{ eos_token }}\n\n"
    "{% else %}### Instruction:\n{{ m.content }}\n\n{% endif %}" + END + GENERATE + "### Response:\n{% endif %}",
    "no end of turn": BODY + "<|im_start|>{{ m.role }}\n{{ m.content }}" + END + "<|im_start|>assistant\n",
}
"""Name -> template. All take any order of roles."""

MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>",
    "<h>", "</h>", "<e>", "<u>", "<a>", "<r>", "</r>", "[INST]", "[/INST]", "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]",
)  # fmt: skip
_EOS = {
    "chatml": "<|im_end|>", "system by default": "<|im_end|>", "harmony": "<|return|>", "thinks": "<|im_end|>",
    "opens a think block": "<e>", "headers": "<e>", "turns": "<e>", "swallowing markers": "<e>", "response marker": "<e>",
}  # fmt: skip


def byte_level() -> Tokenizer:
    """The ChatML zoo tokenizer."""
    return Tokenizer.from_str(zoo.chatml().backend_tokenizer.to_str())


def _prefixed(legacy: bool) -> Tokenizer:
    """BPE with byte fallback and a dummy prefix, as Llama 2 has it (`legacy`) and as Mistral has it."""
    spec = json.loads(zoo.turns().backend_tokenizer.to_str())
    built = Tokenizer.from_str(json.dumps({**spec, "post_processor": None}))
    if legacy:
        built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        built.pre_tokenizer = None
    else:
        built.normalizer = None
        built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert isinstance(built.model, models.BPE)
    return built


BACKENDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "prefixed, legacy": lambda: _prefixed(True),
    "prefixed, first": lambda: _prefixed(False),
}


@lru_cache
def _made(name: str, backend: str) -> PreTrainedTokenizerFast:
    built = BACKENDS[backend]()
    strips = name == "swallowing markers"
    built.add_special_tokens(["<s>", "</s>"])
    built.add_special_tokens([AddedToken(marker, special=True, normalized=False, rstrip=strips) for marker in MARKERS])
    built.add_tokens(["<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token=_EOS.get(name, "</s>"))
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def tokenizer(name: str, backend: str = "byte-level") -> PreTrainedTokenizerFast:
    """A tokenizer with one of `TEMPLATES`, that may be changed."""
    return copy.deepcopy(_made(name, backend))
