"""The table of a sweep: a row per trial, saved as `sweep.json` from the first trial on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from petune.base.config import Config
from petune.base.errors import CheckpointError, ConfigError
from petune.runner.file_names import SWEEP_TABLE
from petune.runner.migrations import updated
from petune.runner.result import RunResult
from petune.runner.sweep.space import Params
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
    val_top1: float | None = None
    val_top5: float | None = None
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
        best: The number of the trial with the highest top-1 on val; the first of equals.
        result: The test of the best one; None until all trials are done, or without a test.
        finished: Everything is done.
        backbone, weights, provenance: As the trials report them.
    """

    config: SweepConfig
    rows: tuple[Trial, ...] = ()
    best: int | None = None
    result: RunResult | None = None
    finished: bool = False
    backbone: str = ""
    weights: str = ""
    provenance: dict[str, Any] = {}
    output: str

    @property
    def params(self) -> Params:
        """The parameters of the best trial; empty if none is done."""
        return {} if self.best is None else dict(self.rows[self.best].params)


def best_of(rows: Sequence[Trial]) -> int | None:
    """Return the number of the trial with the highest top-1 on val, the first of equals; None if none is done."""
    done = [row for row in rows if row.val_top1 is not None]
    return max(done, key=lambda row: (row.val_top1 or 0.0, -row.trial)).trial if done else None


def read_sweep(sweep_dir: Path) -> Sweep | None:
    """Read `sweep.json`; None if there is none.

    Raises:
        CheckpointError: It is damaged.
    """
    file = sweep_dir / SWEEP_TABLE
    if not file.exists():
        return None
    try:
        return Sweep.build(updated(json.loads(file.read_text(encoding="utf-8"))), SWEEP_TABLE)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
