"""The table of a sweep: a row per trial, saved as `sweep.json` from the first trial on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from petune.base.config import Config
from petune.base.metric import Metric
from petune.runner.file_names import SWEEP_TABLE
from petune.runner.migrations import updated_sweep
from petune.runner.result import RunResult
from petune.runner.saved_table import read_saved
from petune.runner.sweep.space import Params, ends_of
from petune.runner.sweep.sweep_config import SweepConfig


class Trial(Config):
    """One trial. A failed one has a reason and no metrics; one that was interrupted is `running`.

    Attributes:
        is_retryable: It failed because of data, weights, network or disk, and runs again when the sweep is resumed.
    """

    trial: int
    params: dict[str, Any]
    state: Literal["running", "done", "failed"]
    reason: str = ""
    is_retryable: bool = False
    val_metrics: dict[str, float] | None = None
    epoch: int | None = None
    lr: float | None = None
    tuned: int | None = None
    head: int | None = None
    percent_of_backbone: float | None = None
    images_per_s: float | None = None
    time_s: float | None = None


class Sweep(Config):
    """The result of a sweep.

    Attributes:
        rows: The trials in order.
        best: The number of the best trial on val; the first of equals.
        result: The test of the best one; None until all trials are done, or without a test.
        finished: Everything is done.
        task, metric_info: As the trials report them; the first metric chooses the best trial.
        backbone, weights, provenance: As the trials report them.
    """

    config: SweepConfig
    rows: tuple[Trial, ...] = ()
    best: int | None = None
    result: RunResult | None = None
    finished: bool = False
    task: str = ""
    metric_info: tuple[Metric, ...] = ()
    backbone: str = ""
    weights: str = ""
    provenance: dict[str, Any] = {}
    output: str

    @property
    def params(self) -> Params:
        """The parameters of the best trial; empty if none is done."""
        return {} if self.best is None else dict(self.rows[self.best].params)

    def val(self, row: Trial) -> float | None:
        """Return a trial's value of the main metric on val; None if there is none."""
        return row.val_metrics.get(self.metric_info[0].name) if row.val_metrics and self.metric_info else None

    def score(self, row: Trial) -> float | None:
        """Return a number that is higher for a better trial; None for one without a value."""
        value = self.val(row)
        return None if value is None else self.metric_info[0].score(value)

    def best_trial(self) -> int | None:
        """Return the number of the best trial on val, the first of equals; None if none is done."""
        scores = {row.trial: self.score(row) for row in self.rows}
        done = {trial: score for trial, score in scores.items() if score is not None}
        return max(done, key=lambda trial: (done[trial], -trial)) if done else None

    def at_an_edge(self) -> list[str]:
        """Return a sentence for each number of the best trial that is the smallest or largest of those searched."""
        sentences = []
        for key, value in self.params.items():
            ends = ends_of(self.config.search[key])
            if ends is not None and value in ends:
                side, way = ("smallest", "smaller") if value == ends[0] else ("largest", "larger")
                sentences.append(f"{key}={value:g} is the {side} that was searched: {way} ones may be better")
        return sentences

    def why_no_best(self) -> str:
        """Return why no trial is the best, in a sentence for a sweep whose `best` is None."""
        if not any(row.state == "done" for row in self.rows):
            reasons = list(dict.fromkeys(row.reason for row in self.rows if row.reason))
            reason = f": {reasons[0]}" if len(reasons) == 1 else ", each for its own reason" if reasons else ""
            return f"no trial is the best, and nothing was tested: all {len(self.rows)} failed{reason}"
        return (
            f"no trial is the best, and nothing was tested: {self.metric_info[0].label} is undefined on val in every "
            "trial. Let another metric or the loss choose (train.choose), or use a larger val split"
        )


def read_sweep(sweep_dir: Path) -> Sweep | None:
    """Read `sweep.json`; None if there is none.

    Raises:
        CheckpointError: It is damaged.
    """
    file = sweep_dir / SWEEP_TABLE
    if not file.exists():
        return None
    return read_saved(Sweep, file, "is damaged", updated_sweep)
