"""The result of a run: what a table row, a plot and a reader of the directory need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from petune.base.config import Config
from petune.base.errors import CheckpointError, ConfigError
from petune.base.files import replace_file
from petune.base.text import format_duration, format_percent, format_size, html_table
from petune.runner.run_dir import RESULT_FILE


class RunResult(Config):
    """What a run yields; saved as `result.json`. Accuracies in percent, of the epoch chosen on val."""

    method: str
    backbone: str
    backbone_full_name: str
    weights: str
    dataset: str
    seed: int
    top1: float
    top5: float
    val_top1: float | None
    epoch: int
    epochs: int
    lr: float
    tuned: int
    head: int
    total: int
    percent_of_total: float
    percent_of_backbone: float
    forward_flops: int
    adapter_bytes: int
    images_per_s: float
    step_time_s: float
    peak_memory_bytes: int
    time_s: float
    output: str
    provenance: dict[str, Any]

    @staticmethod
    def exists(directory: Path) -> bool:
        """Whether the run in `directory` is finished."""
        return (directory / RESULT_FILE).exists()

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read a finished run's result.

        Raises:
            CheckpointError: It is missing or is not a result.
        """
        file = directory / RESULT_FILE
        try:
            return cls.build(json.loads(file.read_text(encoding="utf-8")), RESULT_FILE)
        except (OSError, ValueError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{file} must be the result of a finished run, but: {error}") from None

    def facts(self) -> list[tuple[str, str]]:
        """What a reader wants to know, as names and values."""
        tuned = f"{self.tuned:,}  (with the head {format_percent(self.percent_of_total, 3)} of all parameters, "
        return [
            ("method", self.method),
            ("backbone", f"{self.backbone_full_name}, weights {self.weights}"),
            ("dataset", f"{self.dataset}, seed {self.seed}"),
            ("top-1 on test", format_percent(self.top1)),
            ("top-5 on test", format_percent(self.top5)),
            ("top-1 on val", f"{format_percent(self.val_top1)}  (epoch {self.epoch} of {self.epochs})"),
            ("tuned", f"{tuned}{format_percent(self.percent_of_backbone, 3)} of backbone and head)"),
            ("head", f"{self.head:,}"),
            ("saved", format_size(self.adapter_bytes)),
            ("training", f"{self.images_per_s:,.0f} images/s, {format_duration(self.time_s)}"),
            ("peak memory", format_size(self.peak_memory_bytes)),
            ("output", self.output),
        ]

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return html_table(self.facts())

    def write(self, directory: Path) -> Self:
        """Write it, complete or not at all, and return it."""
        text = json.dumps(self.model_dump(mode="json"), indent=1) + "\n"
        replace_file(directory / RESULT_FILE, text.encode())
        return self
