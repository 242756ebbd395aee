"""Sums that are kept on each rank and turned into the logged ratios once per log interval."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diglot.evaluation import OnPolicyReport

Reduce = Callable[[Mapping[str, float]], dict[str, float]]

# metric -> (numerator, denominator) of the sums below; what `diglot` adds to the Trainer's own log
RATIOS: dict[str, tuple[str, str]] = {
    "completions/mean_length": ("written", "samples"),
    "completions/mean_bytes": ("bytes", "samples"),
    "completions/ended_ratio": ("ended", "samples"),
    "completions/repetition": ("repeated", "repeatable"),
    "completions/tokens_per_byte": ("scored", "bytes"),  # of each text once, however many teachers read it
    "completions/digit_run": ("digits", "digit_runs"),
    "completions/scored": ("scored", "written"),
    "align/coverage": ("covered", "tokens"),
    "align/one_to_one": ("one_to_one", "tokens"),
    "align/dropped": ("dropped", "tokens"),
    "align/chunks_per_token": ("chunks", "tokens"),
    "align/noncanonical": ("noncanonical", "tokens"),
    "on_policy": ("on_policy", "windows"),
}


class StepMetrics:
    """Accumulates sums; `take` gives the interval's metrics and starts anew."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._means: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)
        self._on_device: dict[str, Tensor] = {}  # sum and count of each metric's values, where those are
        self.num_tokens = 0.0  # scored student tokens since the start of training, all ranks

    def add(self, sums: Mapping[str, float]) -> None:
        """Add to the sums behind `RATIOS`."""
        for name, value in sums.items():
            self._sums[name] += value

    def add_mean(self, name: str, total: float, count: float) -> None:
        """A metric of its own: `total` over `count` items."""
        self._means[f"{name}|total"] += total
        self._means[f"{name}|count"] += count

    def add_values(self, metrics: Mapping[str, Tensor], logged: Callable[[str], str]) -> None:
        """The mean of each metric's values, of those that are numbers; `logged` gives its name in the log."""
        for name, values in metrics.items():
            values = values.detach()
            self._add_there(logged(name), values.nansum(dtype=torch.float64), (~values.isnan()).sum())

    def add_total(self, name: str, total: Tensor, count: float) -> None:
        """As `add_mean`, of a sum that is on a device and stays there until the log."""
        self._add_there(name, total.detach(), torch.full_like(total, count, dtype=torch.float64))

    def _add_there(self, key: str, total: Tensor, count: Tensor) -> None:
        self.add_mean(key, 0.0, 0.0)
        both = torch.stack([total.double(), count.double()])
        self._on_device[key] = both + self._on_device[key] if key in self._on_device else both

    def add_count(self, name: str, count: float) -> None:
        """A metric of its own: how often something happened, on all ranks together."""
        self._counts[name] += count

    def take(self, reduce: Reduce) -> dict[str, float]:
        """Metrics of all ranks since the last call. Every rank must call it at the same step.

        `reduce` sums over ranks, and may add names that only other ranks have.
        """
        if self._on_device:  # one copy for a log interval, not one for each metric of each micro-batch
            device = next(iter(self._on_device.values())).device
            sums_of = torch.stack([both.to(device) for both in self._on_device.values()]).tolist()
            for name, (total, count) in zip(self._on_device, sums_of, strict=True):
                self.add_mean(name, total, count)
            self._on_device.clear()
        known = {name: self._sums[name] for pair in RATIOS.values() for name in pair}
        plain = {name: self._sums[name] for name in ("dropped_samples", "scored")}
        sums = reduce({**known, **plain, **self._means, **self._counts})
        self.num_tokens += sums["scored"]
        logs = {name: sums[top] / sums[bottom] for name, (top, bottom) in RATIOS.items() if sums[bottom]}
        logs |= {
            name: sums[f"{name}|total"] / count
            for key in sums
            if key.endswith("|total") and (count := sums[f"{(name := key[:-6])}|count"])
        }
        ours = {*known, *plain}
        logs |= {name: value for name, value in sums.items() if name not in ours and "|" not in name}
        logs["completions/clipped_ratio"] = 1 - logs.pop("completions/ended_ratio", 1.0)
        logs["align/dropped_samples"] = sums["dropped_samples"]
        logs["num_tokens"] = self.num_tokens
        self._sums.clear()
        for values in (self._means, self._counts):
            values.update(dict.fromkeys(values, 0.0))
        return logs


def evaluation_metrics(totals: Mapping[str, float], whole_rows: bool) -> dict[str, float]:
    """What an evaluation logs, from sums over all ranks' samples.

    Without `whole_rows` of the teacher the agreement about stop is left out: it takes the stop probability of each row.
    """
    on_policy = OnPolicyReport.of_totals(totals)
    metrics = {
        "loss": on_policy.reverse_kl_nats_per_byte,
        "reverse_kl_nats_per_byte": on_policy.reverse_kl_nats_per_byte,
        "coverage": on_policy.coverage,
    }
    if whole_rows:
        metrics["stop_agreement"] = on_policy.stop_agreement
    return metrics | reference_metrics(totals)


def reference_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """The part of it that reads the data's own texts, and no teacher; nothing where the data hold none."""
    if not totals["reference/num_bytes"]:
        return {}
    return {"bits_per_byte": totals["reference/nats"] / totals["reference/num_bytes"] / math.log(2)}
