"""The sizing tables of docs/distributed.md, worked out on paper: formulas here, no measurement.

python benchmarks/sizing.py
"""

from __future__ import annotations

from dataclasses import dataclass

GIB, GBIT = 2**30, 1e9 / 8
PEAK = 990e12  # dense bf16 FLOP/s of one H100
SHARE = 0.4  # of it that a prefill or a training step reaches
BANDWIDTH = 3.35e12  # bytes/s of its memory
BATCH = 256  # completions that a server writes at a time
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


@dataclass(frozen=True)
class Plan:
    """A student, a teacher, the GPUs of each, and tokens that one training GPU holds in a micro-batch."""

    student: Model
    teacher: Model
    student_gpus: int
    teacher_gpus: int
    tokens: int = 16_384


PLANS = (
    Plan(Model("1B", 1.2e9, 1.2e9, 16, 2048, 128_256), Model("8B", 8e9, 8e9, 32, 4096, 151_936), 8, 1),
    Plan(Model("8B", 8e9, 8e9, 32, 4096, 128_256), Model("70B", 70e9, 70e9, 80, 8192, 151_936), 16, 4),
    Plan(Model("8B", 8e9, 8e9, 32, 4096, 128_256), Model("400B MoE", 400e9, 17e9, 48, 5120, 202_048), 16, 16),
)


def student_bytes(plan: Plan) -> float:
    """Per GPU: shards, the two largest parts gathered, activations kept by checkpointing, one block of logits.

    Sharded float32 weight, gradient and two moments of AdamW: 16 bytes a parameter over all GPUs. Gathered in bfloat16:
    a layer (twice, one is fetched ahead) and the head with its gradient. Kept: one hidden state a layer and token.
    """
    s = plan.student
    head = s.hidden * s.vocabulary
    layer = (s.parameters - 2 * head) / s.layers
    shards = 16 * s.parameters / plan.student_gpus
    gathered = 2 * 2 * layer + 2 * 2 * head
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
    return 2 * t.parameters / plan.student_gpus + 2 * 2 * (t.parameters - 2 * head) / t.layers + 2 * 2 * head


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
    """Tokens per second that one GPU writes: each step reads the student's bfloat16 weights once, keys aside."""
    return BATCH * SHARE * BANDWIDTH / (2 * plan.student.active)


def memory_table() -> str:
    """Memory per GPU, in GiB."""
    rows = [
        "| pair | GPUs of the student | student, GiB per GPU | teacher sharded beside it | GPUs of a server | server |"
    ]
    rows.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for plan in PLANS:
        cells = [f"{plan.student.name} ← {plan.teacher.name}", str(plan.student_gpus), _gib(student_bytes(plan))]
        cells += [f"+ {_gib(sharded_teacher_bytes(plan))}", str(plan.teacher_gpus), _gib(teacher_bytes(plan))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def wire_table() -> str:
    """Bytes per token by level, the wire at full speed in Gbit/s, and what saturates first."""
    heads = ["pair", "teacher reads, tokens/s", "student trains, tokens/s", "one GPU writes, tokens/s", "level"]
    rows = [f"| {' | '.join([*heads, 'bytes/token', 'Gbit/s', 'first limit'])} |"]
    rows.append("| --- | ---: | ---: | ---: | --- | ---: | ---: | --- |")
    for plan in PLANS:
        reads, trains = teacher_rate(plan), student_rate(plan)
        for level, size in wire_bytes(plan.teacher).items():
            limits = {"teacher": reads, "student": trains, "wire": LINK / size}
            first = min(limits, key=lambda name: limits[name])
            cells = [f"{plan.student.name} ← {plan.teacher.name}", f"{reads:,.0f}", f"{trains:,.0f}"]
            cells += [f"{rollout_rate(plan):,.0f}", level]
            cells += [f"{size:,}", f"{min(reads, trains) * size / GBIT:,.2f}", first]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _gib(size: float) -> str:
    return f"{size / GIB:.0f}"


if __name__ == "__main__":
    print(memory_table(), wire_table(), sep="\n\n")
