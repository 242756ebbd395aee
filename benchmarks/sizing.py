"""The sizing tables of docs/distributed.md, worked out on paper: formulas here, no measurement.

python benchmarks/sizing.py                                                               # the page's pairs
python benchmarks/sizing.py --student ID --teacher ID --student_gpus 8 --teacher_gpus 4   # any pair, from its configs
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

GIB, GBIT = 2**30, 1e9 / 8
PEAK = 990e12  # dense bf16 FLOP/s of one H100
SHARE = 0.4  # of it that a prefill or a training step reaches
BANDWIDTH = 3.35e12  # bytes/s of its memory
BATCH = 256  # completions that a server writes at a time
CONTEXT = 768  # tokens before the one that is written, on average: a prompt of 512 and half of a completion of 512
STEP_SECONDS = 1.5e-3  # of the server's host for each step of such a batch: scheduling, sampling, answering
ALIGN_SECONDS = 7e-6  # of a training process for each token: rendering, aligning, planning
ENTRY_SECONDS = 1.7e-6  # to read one of the likeliest ids from JSON (27 us for 16)
FILES = 2e9  # bytes/s at which states are read from files
LINK = 100 * GBIT  # bytes/s between a teacher's server and the training nodes
TOP_K = 64


@dataclass(frozen=True)
class Model:
    """A decoder as far as its size matters."""

    name: str
    parameters: float
    active: float  # parameters that a token passes through
    layers: int
    hidden: int
    vocabulary: int
    kv: int  # heads of keys times their size
    tied: bool = False  # is its head its embedding?

    @property
    def layer(self) -> float:
        """Parameters of one."""
        return (self.parameters - (1 if self.tied else 2) * self.hidden * self.vocabulary) / self.layers

    @property
    def kv_bytes(self) -> float:
        """Keys and values of one token, bfloat16, in all layers."""
        return 2 * 2 * self.kv * self.layers

    @classmethod
    def of(cls, name: str, parameters: float, active: float, config: Any) -> Model:
        """From a text configuration of `transformers`."""
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv = (getattr(config, "num_key_value_heads", None) or heads) * size
        layers, hidden, vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size
        tied = bool(getattr(config, "tie_word_embeddings", False))
        return cls(name, parameters, active, layers, hidden, vocabulary, kv, tied)


def load_model(place: str) -> Model:
    """Sizes of a model by its configuration (an id or a folder); its weights are not read.

    Of experts only those that a token passes through are active.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(place)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config = config.get_text_config()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    total = float(sum(sizes.values()))
    counts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    many = next((count for count in counts if count), None)
    share = config.num_experts_per_tok / many if many else 1.0
    of_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    return Model.of(place.rstrip("/").split("/")[-1], total, total - (1 - share) * of_experts, config)


@dataclass(frozen=True)
class Plan:
    """A student, a teacher, the GPUs of each, and tokens that one training GPU holds in a micro-batch."""

    student: Model
    teacher: Model
    student_gpus: int
    teacher_gpus: int
    tokens: int = 16_384


PLANS = (
    Plan(Model("1B", 1.2e9, 1.2e9, 16, 2048, 128_256, 512), Model("8B", 8e9, 8e9, 36, 4096, 151_936, 1024), 8, 1),
    Plan(Model("8B", 8e9, 8e9, 32, 4096, 128_256, 1024), Model("70B", 70e9, 70e9, 80, 8192, 151_936, 1024), 16, 4),
    Plan(
        Model("8B", 8e9, 8e9, 32, 4096, 128_256, 1024), Model("400B MoE", 400e9, 17e9, 48, 5120, 202_048, 1024), 16, 16
    ),
)


def student_bytes(plan: Plan) -> float:
    """Per GPU: shards, the two largest parts gathered, activations kept by checkpointing, one block of logits.

    Sharded float32 weight, gradient and two moments of AdamW: 16 bytes a parameter over all GPUs. Gathered in bfloat16:
    a layer (twice, one is fetched ahead) and the head with its gradient. Kept: one hidden state a layer and token.
    """
    s = plan.student
    head = s.hidden * s.vocabulary
    shards = 16 * s.parameters / plan.student_gpus
    gathered = 2 * 2 * s.layer + 2 * 2 * head
    activations = 2 * plan.tokens * s.hidden * s.layers
    logits = GIB  # what default_chunk_rows takes: an eighth of the free memory at most
    return shards + gathered + activations + logits


def teacher_bytes(plan: Plan) -> float:
    """Per GPU of its server: weights in bfloat16, and a tenth of the card for keys and values and buffers."""
    return 2 * plan.teacher.parameters / plan.teacher_gpus + 0.1 * 80 * GIB


def sharded_teacher_bytes(plan: Plan) -> float:
    """Per training GPU, when the teacher is sharded beside the student: its shard and two gathered layers."""
    t = plan.teacher
    head = t.hidden * t.vocabulary
    return 2 * t.parameters / plan.student_gpus + 2 * 2 * t.layer + 2 * 2 * head


def wire_bytes(teacher: Model) -> dict[str, int]:
    """Bytes for each scored token by level: float32 log-probs, int32 ids, bfloat16 states and logits."""
    return {
        "text": 4,
        f"top-{TOP_K}": 8 * TOP_K,
        "hidden": 2 * teacher.hidden,
        "logits": 2 * teacher.vocabulary,
    }


def teacher_rate(plan: Plan) -> float:
    """Tokens per second that the teacher's GPUs can read: 2 FLOP for each active parameter."""
    return SHARE * PEAK * plan.teacher_gpus / (2 * plan.teacher.active)


def student_rate(plan: Plan) -> float:
    """Tokens per second that the training GPUs can train on: 8 FLOP a parameter, one pass of it recomputed."""
    return SHARE * PEAK * plan.student_gpus / (8 * plan.student.active)


def rollout_rate(plan: Plan) -> float:
    """Tokens per second that one GPU writes.

    Each step reads the student's bfloat16 weights once and the keys and values of all contexts, and waits for the host.
    """
    student = plan.student
    read = 2 * student.active + BATCH * CONTEXT * student.kv_bytes
    return BATCH / (read / (SHARE * BANDWIDTH) + STEP_SECONDS)


def host_rate(plan: Plan, level: str) -> float:
    """Tokens per second that the training processes, one a GPU, can read of the teacher's answers and align."""
    seconds = ALIGN_SECONDS
    if level.startswith("top-"):
        seconds += TOP_K * ENTRY_SECONDS
    elif level in ("hidden", "logits"):
        seconds += wire_bytes(plan.teacher)[level] / FILES
    return plan.student_gpus / seconds


def memory_table(plans: tuple[Plan, ...] = PLANS) -> str:
    """Memory per GPU, in GiB."""
    rows = [
        "| pair | GPUs of the student | student, GiB per GPU | teacher sharded beside it | GPUs of a server | server |"
    ]
    rows.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for plan in plans:
        cells = [f"{plan.student.name} ← {plan.teacher.name}", str(plan.student_gpus), _gib(student_bytes(plan))]
        cells += [f"+ {_gib(sharded_teacher_bytes(plan))}", str(plan.teacher_gpus), _gib(teacher_bytes(plan))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def wire_table(plans: tuple[Plan, ...] = PLANS) -> str:
    """Bytes per token by level, the wire at full speed in Gbit/s, and what saturates first."""
    heads = ["pair", "teacher reads, tokens/s", "student trains, tokens/s", "one GPU writes, tokens/s", "level"]
    rows = [f"| {' | '.join([*heads, 'bytes/token', 'Gbit/s', 'hosts read, tokens/s', 'first limit'])} |"]
    rows.append("| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |")
    for plan in plans:
        reads, trains = teacher_rate(plan), student_rate(plan)
        for level, size in wire_bytes(plan.teacher).items():
            hosts = host_rate(plan, level)
            limits = {"teacher": reads, "student": trains, "wire": LINK / size, "hosts": hosts}
            first = min(limits, key=lambda name: limits[name])
            cells = [f"{plan.student.name} ← {plan.teacher.name}", f"{reads:,.0f}", f"{trains:,.0f}"]
            cells += [f"{rollout_rate(plan):,.0f}", level]
            cells += [f"{size:,}", f"{min(reads, trains) * size / GBIT:,.2f}", f"{hosts:,.0f}", first]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _gib(size: float) -> str:
    return f"{size / GIB:.0f}"


def main(arguments: list[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="How many GPUs does a pair need, and what is its first limit?")
    parser.add_argument("--student", metavar="MODEL", help="id or folder")
    parser.add_argument("--teacher", metavar="MODEL", help="id or folder")
    parser.add_argument("--student_gpus", type=int, default=8)
    parser.add_argument("--teacher_gpus", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=Plan.tokens, help="in a micro-batch of one GPU")
    options = parser.parse_args(arguments)
    if (options.student is None) != (options.teacher is None) or min(options.student_gpus, options.teacher_gpus) < 1:
        parser.error("give both --student and --teacher, and at least one GPU for each")
    plans = PLANS
    if options.student is not None:
        models = load_model(options.student), load_model(options.teacher)
        plans = (Plan(*models, options.student_gpus, options.teacher_gpus, options.tokens),)
    print(memory_table(plans), wire_table(plans), sep="\n\n")


if __name__ == "__main__":
    main()
