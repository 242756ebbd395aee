"""The table below the progress bar of a notebook. Needs IPython, so it is imported in notebooks only."""

from __future__ import annotations

from typing import Any

from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker

from diglot.watching.shown import numbers_that_matter

# End of a metric's name -> heading of its column.
EVALUATED = {
    "reverse_kl_nats_per_byte": "eval nats/byte",
    "bits_per_byte": "eval bits/byte",
    "stop_agreement": "eval stop",
    "coverage": "eval coverage",
}


_Tracker: Any = NotebookTrainingTracker  # transformers gives it no types


class NotebookNumbers(NotebookProgressCallback):
    """One line of the numbers that matter for every log, and of every evaluation with its units."""

    training_tracker: Any

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        super().on_train_begin(args, state, control, **others)  # type: ignore[no-untyped-call]
        self.training_tracker = _Tracker(state.max_steps)  # the first line makes the columns

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.training_tracker is not None and logs and "loss" in logs:
            self._write({"Step": state.global_step, **numbers_that_matter(logs)})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **_: Any) -> None:
        row = {"Step": state.global_step}
        for name, value in (metrics or {}).items():
            column = next((EVALUATED[end] for end in EVALUATED if name.endswith(f"_{end}")), None)
            if column is not None:
                row[column] = f"{value:.3f}"
        if self.training_tracker is None:
            self.training_tracker = _Tracker(1)
            self._write(row)
            self.training_tracker.display()
            self.training_tracker = None
        else:
            self._write(row)
            self.training_tracker.remove_child()
            self._force_next_update = True
        self.prediction_bar = None

    def _write(self, values: dict[str, Any]) -> None:
        """A line with all columns; an evaluation behind a log of the same step goes into its line."""
        columns, *rows = self.training_tracker.inner_table or [[]]
        before = rows[-1] if rows and rows[-1][0] == values["Step"] else [""] * len(columns)
        self.training_tracker.write_line({**dict(zip(columns, before, strict=False)), **values})
