"""Record what a real vLLM says, for tests that replay it where vLLM cannot be installed. Run by hand:

    python demo/vllm_server.py install && python demo/assets.py get smollm2-135m-instruct
    PYTHONPATH=src:tests:demo python tests/rollouts/record.py server     # in this project's environment
    PYTHONPATH=src:tests:demo PYTHON_OF_VLLM tests/rollouts/record.py colocate    # in vLLM's

Each writes one file into `recorded/`. What is long and not read is left out, and the folder of the weights has a
name of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from diglot.rollouts.vllm_wire import Sampling
from diglot.rollouts.weights import WeightsFolder

HERE = Path(__file__).parent / "recorded"
QUESTIONS = ("Say hi.", "What is two and two?", "Name a colour.")
STOP, LENGTH, SEEDS = 2, 24, (3, 2**63 - 1, 11)


def student(folder: Path) -> PreTrainedModel:
    """A model that is not what the server was started with: every weight a little different."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.02 * p.std())
    return model


def prompts(folder: Path) -> list[Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        np.array(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False
            )
        )
        for q in QUESTIONS
    ]


@torch.no_grad()
def own_logps(model: PreTrainedModel, prompt: Any, ids: Any) -> list[float]:
    """What transformers says about a completion, nats."""
    read = torch.from_numpy(np.concatenate([prompt, ids]))[None]
    rows = model(input_ids=read).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.from_numpy(ids)[:, None])[:, 0].tolist()


def record_server(model_folder: Path) -> dict[str, Any]:
    import vllm_server

    from diglot.http.client import Client, Refused
    from diglot.rendering import Renderer
    from diglot.rollouts import vllm_server as engines

    exchanges: list[dict[str, Any]] = []

    class Recording(Client):
        def _with_retries(self, method: str, path: str, body: Any, limit: int, once: bool = False) -> Any:
            entry: dict[str, Any] = {"method": method, "path": path, "body": named(body), "once": once}
            exchanges.append(entry)
            try:
                answer = super()._with_retries(method, path, body, limit, once)
            except Refused as error:
                entry.update(status=error.status, message=error.answer)
                raise
            entry.update(status=200, answer=shortened(path, answer))
            return answer

    engines.Client = Recording  # type: ignore[misc]
    renderer = Renderer(AutoTokenizer.from_pretrained(model_folder), name="student")
    with tempfile.TemporaryDirectory() as place:
        copy = vllm_server.untie(model_folder, Path(place) / "student")
        with vllm_server.running(copy, Path(place) / "log", VLLM_SERVER_DEV_MODE="1") as url:
            weights = WeightsFolder(Path(place) / "weights")
            distribution = Sampling((STOP,))
            engine = engines.VLLMServer.connect(url, renderer, distribution, weights, max_length=512, timeout=120)
            model, questions = student(model_folder), prompts(model_folder)
            engine.sync(model)
            results = [
                engine.write(model, [p], max_new_tokens=LENGTH, seed=[s])[0]
                for p, s in zip(questions, SEEDS, strict=True)
            ]
            engine.sampling = Sampling((STOP, 30), 0.7, 0.9, 20)
            engine.write(model, questions[:1], max_new_tokens=LENGTH, seed=[5])
            try:
                engine.write(model, [np.arange(600)], max_new_tokens=LENGTH, seed=[5])
            except Exception as error:
                print(error)
            engine.close()
    own = [own_logps(model, p, c.ids) for p, c in zip(questions, results, strict=True)]
    return {
        "prompts": [p.tolist() for p in questions],
        "transformers_logps": own,
        "exchanges": exchanges,
    }


def record_colocate(model_folder: Path) -> dict[str, Any]:
    import vllm

    from diglot.rollouts.vllm_colocate import ColocatedVLLM

    calls: list[dict[str, Any]] = []
    generate = vllm.LLM.generate

    def recording(self: Any, prompts: Any, questions: Any, **more: Any) -> Any:
        answers = generate(self, prompts, questions, **more)
        for one, params, out in zip(prompts, questions, answers, strict=True):
            best = out.outputs[0]
            logps = [{str(i): lp.logprob for i, lp in row.items()} for row in best.logprobs]
            asked_for = {n: getattr(params, n) for n in ("seed", "temperature", "max_tokens", "ignore_eos")}
            record = {"token_ids": list(best.token_ids), "logprobs": logps, "finish_reason": best.finish_reason}
            calls.append({**one, **asked_for, **record})
        return answers

    vllm.LLM.generate = recording
    with tempfile.TemporaryDirectory() as place:
        options = {"max_model_len": 512, "enforce_eager": True, "max_num_seqs": 8}
        engine = ColocatedVLLM(Sampling((STOP,)), WeightsFolder(Path(place)), options)
        first = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        model, questions = student(model_folder), prompts(model_folder)
        engine.sync(first)
        before = engine.write(first, questions, max_new_tokens=LENGTH, seed=SEEDS)
        engine.sync(model)
        after = engine.write(model, questions, max_new_tokens=LENGTH, seed=SEEDS)
        own = [
            [own_logps(m, p, c.ids) for p, c in zip(questions, result, strict=True)]
            for m, result in ((first, before), (model, after))
        ]
        engine.close()
    return {"prompts": [p.tolist() for p in questions], "transformers_logps": own, "calls": calls}


def named(body: Any) -> Any:
    """The same with the folder of the weights by another name."""
    if isinstance(body, dict) and "weights_path" in body.get("kwargs", {}):
        return {**body, "kwargs": {"weights_path": "WEIGHTS"}}
    return body


def shortened(path: str, answer: Any) -> Any:
    if path == "/v1/models":
        return {"data": [{k: m[k] for k in ("id", "owned_by", "max_model_len")} for m in answer["data"]]}
    if path == "/server_info":
        text = str(answer["vllm_config"])
        return {"vllm_config": text[text.index("device_config=") :].split(",")[0]}
    if path == "/weight_checker":
        return {"checksums": {k: v for k, v in answer["checksums"].items() if ".layers." not in k}}
    if path == "/v1/completions":
        fields = ("finish_reason", "stop_reason", "token_ids", "prompt_token_ids", "logprobs", "index", "text")
        choice = {k: answer["choices"][0][k] for k in fields}
        return {"object": answer["object"], "choices": [choice], "usage": answer["usage"]}
    return answer


if __name__ == "__main__":
    from support.real_assets import model_folder

    what = sys.argv[1]
    recordings = {"server": record_server, "colocate": record_colocate}[what](model_folder("smollm2-135m-instruct"))
    HERE.mkdir(exist_ok=True)
    made = json.dumps({"vllm": "0.32.0", "sampling": asdict(Sampling((STOP,))), **recordings}, indent=1)
    (HERE / f"{what}.json").write_text(made + "\n", encoding="utf-8")
    print({k: len(v) for k, v in recordings.items()})
