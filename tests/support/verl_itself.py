"""verl's own teacher manager and loss with the plug-in in their places; prints what they give as JSON.

python verl_itself.py FOLDER: where verl and what it imports are. In a process of its own: importing verl changes much.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

sys.path.append(sys.argv[1])

import support.tokenizers_zoo as zoo
import torch
from support.proxy import MODEL, STUDENT, Conversation, context, expected
from tensordict import TensorDict
from verl.experimental.teacher_loop import teacher_manager
from verl.trainer.distillation import losses

from diglot.engines.plugins import verl as plugin

ASK = "Well?"


class Client:
    """As verl's client of its own vLLM answers: row `t` is about id `t + 1`, and one of padding at the end."""

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> Any:
        assert sampling_params["prompt_logprobs"] == 0
        ids = torch.tensor(prompt_ids)
        with torch.no_grad():
            rows = MODEL(ids[None]).logits[0].log_softmax(-1)
        own = rows[:-1].gather(-1, ids[1:, None]).tolist()
        fields = {"prompt_ids": [[i] for i in prompt_ids[1:]] + [[0]], "prompt_logprobs": [*own, [0.0]]}
        return SimpleNamespace(extra_fields=fields)


def main() -> None:
    """One sequence through both."""
    with tempfile.TemporaryDirectory() as folder:
        zoo.chatml().save_pretrained(f"{folder}/student")
        zoo.inst().save_pretrained(f"{folder}/teacher")
        plugin.install(f"{folder}/student", f"{folder}/teacher")
    manager = object.__new__(teacher_manager.AsyncTeacherLLMServerManager)
    settings = losses.get_distillation_loss_settings(plugin.LOSS)
    manager.distillation_loss_config = SimpleNamespace(loss_settings=settings, topk=0)
    manager.teacher_model_configs = {"one": SimpleNamespace(inference=SimpleNamespace(temperature=1.0))}
    manager.teacher_client = {"one": Client()}
    ids = context()
    length = len(STUDENT.prompt_ids(Conversation(({"role": "user", "content": ASK},))))
    names, logps = asyncio.run(manager.compute_teacher_logprobs_single(sequence_ids=ids))

    student = torch.full((len(ids),), -1.5, requires_grad=True)  # as verl has log-probs: about the following id
    data = TensorDict(
        {
            "prompts": torch.tensor([ids[:length]]),
            "responses": torch.tensor([ids[length:]]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "response_mask": torch.ones(1, len(ids) - length, dtype=torch.long),
            "teacher_logprobs": torch.nested.as_nested_tensor([logps], layout=torch.jagged),
        },
        batch_size=[1],
    )
    tokens = len(ids) - length
    batch = {"dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": 1}
    config = SimpleNamespace(loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None)
    loss_config = SimpleNamespace(loss_mode=plugin.LOSS, loss_max_clamp=None, use_policy_gradient=False)
    values = {**{name: data[name] for name in data.keys()}, **batch}  # noqa: SIM118
    loss, metrics = losses.distillation_loss(
        config, SimpleNamespace(distillation_loss=loss_config), {"log_probs": student}, Batch(values)
    )
    loss.backward()
    right = [r for r in expected(ids, ASK, length) if r is not None]
    assert student.grad is not None
    print(json.dumps({
        "following": names[:-1, 0].tolist() == ids[1:],
        "rows": logps[length - 1 : -1, 0].tolist(),
        "expected": right,
        "loss": loss.item(),
        "gradient": student.grad.tolist(),
        "first": length - 1,
        "metrics": sorted(metrics),
    }))  # fmt: skip


class Batch(dict):
    """Tensors and plain numbers by name, as verl's `TensorDict` with data that is no tensor."""


if __name__ == "__main__":
    main()
