"""The result of a run: everything that a table row, a plot and a reader of the directory need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from petune.base.config import Config
from petune.base.files import replace_file
from petune.base.metric import Metric, shown_metrics
from petune.base.text import format_duration, format_percent, format_size, html_table
from petune.runner.file_names import RESULT_FILE
from petune.runner.migrations import updated_result
from petune.runner.saved_table import read_saved


class RunResult(Config):
    """The result of a run; saved as `result.json`.

    Attributes:
        method, backbone, weights, dataset, seed: As in the configuration.
        backbone_full_name: With the options that the model was built with.
        task: What was trained for, as `classification`.
        metrics: On test by name, of the epoch chosen on val.
        val_metrics: On val; None without a val split.
        metric_info: How to show the metrics; the first one chose the epoch and sorts tables.
        epoch, epochs: The chosen epoch, from 1, and how many were trained.
        stopped_early: Whether patience ended the training before its last epoch.
        lr: Peak learning rate.
        tuned, head, total: Parameters of the method, of the classifier, and of the whole model.
        percent_of_total, percent_of_backbone: Trained parameters, of all, and of backbone and classifier.
        forward_flops: Of one image; a multiply-add counts as two.
        adapter_bytes: Size of the saved tensors.
        images_per_s, step_time_s: Means over the training.
        peak_memory_bytes: Of training and test.
        time_s: Wall time of the training.
        output: The run directory, as it was called then.
        provenance: Versions, machine, threads, commit; see `petune.runner.provenance`.
        from_run: The run that this one continues from, if it does.
        num_classes: Classes of the dataset; None if an older version wrote the result.
        num_images: Of train, val and test; empty if an older version wrote the result.
        num_frames: Frames of a clip; None for images. Of clips, `images_per_s` and `forward_flops` are those of a clip.
    """

    method: str
    backbone: str
    backbone_full_name: str
    weights: str
    dataset: str
    seed: int
    task: str
    metrics: dict[str, float]
    val_metrics: dict[str, float] | None
    metric_info: tuple[Metric, ...] = Field(min_length=1)
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
    from_run: str | None = None
    num_classes: int | None = None
    num_images: dict[str, int] = {}
    num_frames: int | None = None
    stopped_early: bool = False

    @property
    def top1(self) -> float | None:
        """Top-1 accuracy on test in percent; None if the task has no such metric."""
        return self.metrics.get("top1")

    @property
    def top5(self) -> float | None:
        """Top-5 accuracy on test in percent; None if the task has no such metric."""
        return self.metrics.get("top5")

    @property
    def val_top1(self) -> float | None:
        """Top-1 accuracy on val in percent; None without a val split, or if the task has no such metric."""
        return (self.val_metrics or {}).get("top1")

    @staticmethod
    def exists(directory: Path) -> bool:
        """Return whether the run in `directory` is finished."""
        return (directory / RESULT_FILE).exists()

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the result of a finished run, of this version or an older one.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        return read_saved(cls, directory / RESULT_FILE, "is not the result of a finished run", updated_result)

    def write(self, directory: Path) -> Self:
        """Write `result.json` and return the result."""
        text = json.dumps(self.model_dump(mode="json"), indent=1) + "\n"
        replace_file(directory / RESULT_FILE, text.encode())
        return self

    def facts(self) -> list[tuple[str, str]]:
        """Return names and values for people to read."""
        main = self.metric_info[0]
        unit = "images" if self.num_frames is None else "clips"
        val = (self.val_metrics or {}).get(main.name)
        counts = [f"{part} {number:,}" for part, number in self.num_images.items() if number]
        sizes = f"; {unit}: {', '.join(counts)}" if counts else ""
        early = ", stopped early" if self.stopped_early else ""
        of_all = format_percent(self.percent_of_total, 3)
        of_backbone = format_percent(self.percent_of_backbone, 3)
        share = f"{of_all} of all parameters, {of_backbone} of backbone and head"
        precision = self.provenance.get("precision", "precision not recorded")
        final_fit = self.provenance.get("final_fit")
        again = "; then trained again on train and val" if final_fit == "train+val" else ""
        on_val = f"{main.text(val)}  (epoch {self.epoch} of {self.epochs}{early}{again})"
        return [
            ("method", self.method),
            *([("continued from", self.from_run)] if self.from_run else ()),
            ("backbone", f"{self.backbone_full_name}, weights {self.weights}"),
            ("dataset", f"{self.dataset}, seed {self.seed}{sizes}"),
            *((f"{m.label} on test", m.text(self.metrics.get(m.name))) for m in shown_metrics(self.metric_info)),
            (f"{main.label} on val", "none: val trained too" if final_fit == "only" else on_val),
            ("tuned", f"{self.tuned:,}  (with the head {share})"),
            ("head", f"{self.head:,}"),
            ("saved", format_size(self.adapter_bytes)),
            ("training", f"{self.images_per_s:,.0f} {unit}/s, {format_duration(self.time_s)}, {precision}"),
            ("peak memory", format_size(self.peak_memory_bytes)),
            ("output", self.output),
        ]

    def _repr_html_(self) -> str:
        """Show the facts in a notebook."""
        return html_table(self.facts())
