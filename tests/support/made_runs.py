"""A run's folder made by hand: two languages, markup in the text, both ends and some of the middle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def chunk(text: str, gap: float | None, **other: Any) -> dict[str, Any]:
    """A chunk whose teacher likes it `gap` nats more than the student; None: it cannot be compared."""
    made = dict(text=text, student=[text], teacher=[text[:1], text[1:]], logp_s=-2.0, logp_t=-2.0 + (gap or 0.0))
    tops = dict(
        top_s=[[" the", 0.41], [" a", 0.2], ["\n", 0.05]], top_t=[[" one", 0.62], ["<b>", 0.1], ["\\xe2", 0.004]]
    )
    return {**made, **tops, "comparable": gap is not None, "stop": False, **other}


def rollout(step: int, phase: str, place: int, words: list[tuple[str, float | None]], **other: Any) -> dict[str, Any]:
    chunks = [chunk(text, gap) for text, gap in words]
    chunks.append(chunk("<|im_end|>", -5.0, stop=True, teacher=["<eos>"]))
    text = "".join(word for word, _ in words)
    where = dict(step=step, phase=phase, place=place, prompt=f"Question {place}: {EVIL}", completion=text)
    return {**where, "stopped": True, "num_bytes": len(text.encode()), "on_policy": True, "chunks": chunks, **other}


WORDS: list[tuple[str, float | None]] = [
    ("The", 0.1), (" sky", 1.2), (" is", 0.0), (" blue", 3.9), (",", -0.9), (" because", -2.2), (" naïve", -4.5),
    (" 数学", 2.1), (" مرحبا", -1.0), ("\n", 0.4), (EVIL, -6.0), ("\\xf0\\x9f", None), (" end", 0.2),
]  # fmt: skip


def make_run(folder: Path, shift: float = 0.0, steps: int = 40) -> Path:
    """Write the files of a run whose divergence falls, with `shift` added to it."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    fixed = {"fixed/stop_agreement": 0.5, "fixed/coverage": 0.99, "fixed/mean_bytes": 120.0}
    lines.append({"step": 0, "phase": "before", "fixed/kl_nats_per_byte": 0.3, "fixed/bits_per_byte": 1.0, **fixed})
    for step in range(1, steps + 1):
        wave = 0.02 * ((step * 7) % 5)
        log = {"loss": 0.5 / step + wave, "grad_norm": 3 + wave, "rollouts/kl_nats_per_byte": 0.3 / step + wave + shift}
        log |= {"completions/mean_bytes": 120 - step, "align/coverage": 0.99, "rollouts/stop_agreement": 0.5}
        lines.append({"step": step, **log, "completions/repetition": 0.9 * step / steps, "learning_rate": 1e-5})
        if step % 10 == 0:
            lines.append(
                {"step": step, "eval_reverse_kl_nats_per_byte": 0.2 / step + shift, "eval_bits_per_byte": 1.01}
            )
    after = {"fixed/kl_nats_per_byte": 0.1 + shift, "fixed/bits_per_byte": 1.02}
    lines.append({"step": steps, "phase": "after", **after, **fixed})
    rollouts = [rollout(0, "before", place, WORDS) for place in (0, 1)]
    rollouts += [rollout(step, "training", 0, WORDS[:5], on_policy=False) for step in range(0, steps, 2)]
    better = [(text, None if gap is None else gap / 2) for text, gap in WORDS]
    rollouts += [rollout(steps, "after", place, better) for place in (0, 1)]
    for name, records in (("metrics", lines), ("rollouts", rollouts)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    config = {"model_name_or_path": "student", "teacher_model_name_or_path": EVIL, "trainer": "gkd"}
    config |= {"learning_rate": shift}
    (folder / "resolved_config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    inspection = {"verdict": f"works {EVIL}", "student": {"kind": "byte-level", "size": 49152}, "stops": [1, 2]}
    inspection["tokens"] = [{"text": "1 + 1", "aligned": True}, {"text": EVIL, "aligned": False}]
    (folder / "inspection.json").write_text(json.dumps(inspection), encoding="utf-8")
    return folder
