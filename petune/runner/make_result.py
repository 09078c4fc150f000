"""From a trained model to `RunResult`: metrics on test, costs, provenance."""

from __future__ import annotations

from dataclasses import dataclass

from petune.base.metric import SplitMetrics
from petune.runner.continued import history
from petune.runner.provenance import forward_flops, provenance
from petune.runner.result import RunResult
from petune.runner.trained import Trained


@dataclass(frozen=True)
class Measured:
    """Measurements after training.

    Attributes:
        test: On the test split, read once.
        forward_flops: Of one image.
        peak_memory_bytes: Of training and test, in all processes that worked on this run.
    """

    test: SplitMetrics
    forward_flops: int
    peak_memory_bytes: int


def measure(trained: Trained) -> Measured:
    """Test a trained model and measure its costs."""
    ready = trained.ready
    test = trained.trainer.evaluate("test")
    peak = max(ready.memory.bytes(), trained.trainer.progress.peak_bytes)
    attachment = ready.attachment
    return Measured(test, forward_flops(attachment.model, attachment.sites.input_spec), peak)


def make_result(trained: Trained, measured: Measured, saved_bytes: int) -> RunResult:
    """Collect everything that is known about a finished run.

    Args:
        trained: The run.
        measured: Its test and costs.
        saved_bytes: Size of the saved tensors.
    """
    config, backbone, fit = trained.ready.config, trained.ready.backbone, trained.fit
    start = trained.ready.start
    counts = trained.ready.attachment.counts
    metrics = trained.metric_info
    how = {
        "precision": fit.precision,
        "micro_batch_size": fit.micro_batch_size,
        "num_processes": fit.num_processes,
        **({"final_fit": trained.final_fit} if trained.final_fit else {}),
        **({"continued_from": history(start)} if start else {}),
    }
    return RunResult(
        method=config.method,
        backbone=config.backbone,
        backbone_full_name=backbone.full_name,
        weights=backbone.weights,
        dataset=config.dataset,
        seed=config.seed,
        task=trained.ready.task.name,
        metrics=measured.test.report(metrics),
        val_metrics=fit.val.report(metrics) if fit.val else None,
        metric_info=metrics,
        epoch=fit.epoch,
        epochs=len(fit.epochs),
        stopped_early=fit.stopped_early,
        lr=fit.lr,
        tuned=counts.tuned,
        head=counts.head,
        total=counts.total,
        percent_of_total=counts.percent_of_total,
        percent_of_backbone=counts.percent_of_backbone,
        forward_flops=measured.forward_flops,
        adapter_bytes=saved_bytes,
        images_per_s=fit.images_per_s,
        step_time_s=fit.step_time_s,
        peak_memory_bytes=measured.peak_memory_bytes,
        time_s=fit.time_s,
        output=str(trained.run_dir),
        provenance=provenance(trained.ready.device) | how,
        num_classes=len(trained.ready.dataset.classes),
        num_images={part: len(getattr(trained.ready.dataset, part)) for part in ("train", "val", "test")},
        num_frames=trained.ready.dataset.train.num_frames,
        from_run=str(config.from_run) if config.from_run else None,
    )
