"""How many held-out questions saved models answer right, decoding greedily.

    python -m benchmarks.quality.answers MODEL [MODEL ...] [--task gsm8k] [--questions 200] [--max_new_tokens 256]

A model is a folder or a name of `demo/assets.py`. With `--task programs` what it writes is run, in a process of its
own with bounds on time and memory.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from assets import MODELS, fetch_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from diglot.data import to_sample
from diglot.rendering import Renderer
from diglot.rollouts import TransformersSampler

from .models_bench import replies
from .tasks import TASKS, items


def main(arguments: list[str] | None = None) -> None:
    """A line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--task", choices=[name for name in TASKS if name != "prose"], default="gsm8k")
    parser.add_argument("--questions", type=int, default=200, help="the first so many held-out ones")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=25)
    options = parser.parse_args(arguments)

    transformers_logging.disable_progress_bar()
    questions = items(options.task, "test")[: options.questions]
    conversations = [to_sample(one.row, where=f"question {i}").conversation for i, one in enumerate(questions)]
    for name in options.models:
        folder = str(fetch_model(name)) if name in MODELS else name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        renderer = Renderer.of_model(model, AutoTokenizer.from_pretrained(folder), name="student")
        greedy = TransformersSampler(renderer.stop_ids, renderer.stop_id, top_k=1)
        texts = replies(model, renderer, greedy, conversations, options.max_new_tokens, options.batch, 0)
        right = sum(one.grade(text) for one, text in zip(questions, texts, strict=True) if one.grade is not None)
        share = right / len(questions)
        error = math.sqrt(share * (1 - share) / len(questions))
        print(f"{Path(name).name}: {right} of {len(questions)} right, {share:.1%} ± {error:.1%}", flush=True)


if __name__ == "__main__":
    main()
