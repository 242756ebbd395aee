"""The model card of a distilled student."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

_PAPERS = {
    "GKD": ("On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", "2306.13649"),
    "MiniLLM": ("MiniLLM: Knowledge Distillation of Large Language Models", "2306.08543"),
}

_TEMPLATE = """---
{{ card_data }}
---

# {{ model_name }}

This model is [{{ student }}](https://huggingface.co/{{ student }}), distilled on-policy from the teacher
[{{ teacher }}](https://huggingface.co/{{ teacher }}) with Diglot{% if dataset %}
on {{ dataset }}{% endif %}.

| | |
| --- | --- |
| method | {{ method }}, [{{ title }}](https://arxiv.org/abs/{{ arxiv }}) |
| student's tokenizer | {{ vocabulary_s }} |
| teacher's tokenizer | {{ vocabulary_t }} |
| vocabularies | {{ relation }} |
| versions | {{ versions }} |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ model_name }}")
tokenizer = AutoTokenizer.from_pretrained("{{ model_name }}")
```
"""


def model_card(
    *,
    model_name: str,
    student: str,
    teacher: str,
    dataset: str | None,
    method: str,
    vocabulary_s: str,
    vocabulary_t: str,
    relation: str,
    versions: str,
    tags: list[str] | None = None,
) -> ModelCard:
    """A card with the metadata that the hub reads (`base_model`, `datasets`, tags) and a page for people.

    Args:
        method: "GKD" or "MiniLLM".
        vocabulary_s: one line on the student's tokenizer.
        vocabulary_t: one on the teacher's.
        relation: whether the vocabularies are the same, and what was done if not.
    """
    title, arxiv = _PAPERS[method]
    data = ModelCardData(
        base_model=student,
        datasets=[dataset] if dataset else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["diglot", method.lower(), "on-policy-distillation", *(tags or [])],
        teacher=teacher,
    )
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        model_name=model_name,
        student=student,
        teacher=teacher,
        dataset=dataset,
        method=method,
        title=title,
        arxiv=arxiv,
        vocabulary_s=vocabulary_s,
        vocabulary_t=vocabulary_t,
        relation=relation,
        versions=versions,
    )
