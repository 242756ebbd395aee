"""What is run on one process and on two: trainers, objectives, and windows that ranks share unevenly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support import distributed_pairs as pairs

GKD, MINILLM = {"trainer": "gkd"}, {"trainer": "minillm"}
LORA = {"use_peft": "true", "lora_r": 4, "lora_target_modules": "all-linear"}

# name -> (the folder of the pair, options)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "jsd": ("same", {**GKD, "lmbda": 1.0}),
    "jsd_data": ("same", {**GKD, "lmbda": 0.0}),
    "covering": ("cross", {**GKD, "lmbda": 1.0}),
    "covering_data": ("cross", {**GKD, "lmbda": 0.0}),
    "covering_split": ("cross", {**GKD, "lmbda": 0.5, "gradient_accumulation_steps": 2}),
    "strict": ("cross", {**GKD, "objective": "strict", "lmbda": 1.0}),
    "routed": ("routed", {**GKD, "lmbda": 1.0}),
    "bpm": ("cross", {**GKD, "objective": "bpm", "lmbda": 1.0}),
    "byte": ("cross", {**GKD, "objective": "byte", "lmbda": 0.0}),
    "span": ("cross", {**GKD, "objective": "span", "lmbda": 1.0}),
    "several_terms": ("cross", {**GKD, "objective": ["strict", {"name": "alm", "weight": 0.1}], "lmbda": 0.0}),
    "teacher_writes": ("cross", {**GKD, "lmbda": 0.0, "seq_kd": "true"}),
    "empty_rank": ("sparse", {**GKD, "lmbda": 0.0}),
    "empty_rank_sampled": ("sparse", {**GKD, "lmbda": 1.0, "num_generations": 2}),
    "ahead": ("cross", {**GKD, "objective": "span", "lmbda": 1.0, "rollout_ahead": 1}),
    "ahead_empty_rank": ("sparse", {**GKD, "lmbda": 1.0, "num_generations": 2, "rollout_ahead": 1}),
    "lora": ("cross", {**GKD, **LORA, "lmbda": 1.0}),
    "checkpointing": ("cross", {**GKD, "lmbda": 0.0, "gradient_checkpointing": "true"}),
    "minillm_jsd": ("same", {**MINILLM, "num_iterations": 2}),
    "minillm": ("cross", {**MINILLM, "num_iterations": 2}),
    "minillm_ahead": ("cross", {**MINILLM, "num_iterations": 1, "rollout_ahead": 1}),
    "minillm_bpm": ("cross", {**MINILLM, "num_iterations": 1, "objective": "bpm", "teacher_mixed_alpha": 0.0}),
    "minillm_empty_rank": ("sparse", {**MINILLM, "num_iterations": 2}),
    "minillm_lora": ("cross", {**MINILLM, **LORA, "num_iterations": 2}),
}
DDP_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "dskd": ("cross", {**GKD, "objective": "dskd", "lmbda": 0.0}),
    "minillm_lm": ("cross", {**MINILLM, "num_iterations": 2, "lm_dataset_name": "rows.jsonl"}),
}
ALL = {**CASES, **DDP_ONLY}


def make_pairs(root: Path) -> None:
    """Equal vocabularies, different ones, these with data of which most rows are too long to use, and two teachers."""
    pairs.make_pair(root / "same", teacher="chatml")
    pairs.make_pair(root / "cross")
    long = {"messages": [{"role": "user", "content": "so " * 400}, {"role": "assistant", "content": "yes"}]}
    rows = pairs.uneven_rows()
    pairs.make_pair(root / "sparse", rows=[row if i % 4 == 1 else long for i, row in enumerate(rows)])
    uneven = [{**row, "teacher": "other" if i % 4 else "own"} for i, row in enumerate(rows)]
    pairs.make_pair(root / "routed", rows=uneven)


def commands(
    root: Path, names: dict[str, tuple[str, dict[str, Any]]], processes: int, how: str, **more: Any
) -> dict[str, list[str]]:
    """The command line of each case, into the folder `<how><processes>/<name>`."""
    results = {}
    for name, (folder, options) in names.items():
        options = {**options, **more}
        if folder == "routed":  # ranks whose rows belong to different teachers
            teachers = {"own": root / "same" / "teacher", "other": root / folder / "teacher"}
            options["teacher_model_name_or_path"] = [{"name": str(p), "label": n} for n, p in teachers.items()]
        if "lm_dataset_name" in options:
            options["lm_dataset_name"] = root / folder / options["lm_dataset_name"]
        if "gradient_accumulation_steps" in options:
            options["per_device_train_batch_size"] = 4 // processes // int(options["gradient_accumulation_steps"])
        out = root / f"{how}{processes}" / name
        results[name] = pairs.arguments(root / folder, out, processes, how, **options)
    return results
