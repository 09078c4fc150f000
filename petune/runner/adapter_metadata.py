"""Metadata in a run's adapter directory: how to build the backbone, class names, results."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from petune.adapters.format import SPLIT_OPTIONS
from petune.backbones.create import Backbone
from petune.backbones.weights import absolute_weights
from petune.base.metric import SplitMetrics
from petune.data.dataset import Dataset
from petune.data.manifest import digests
from petune.data.video.clips import Clips
from petune.data.video.sampling import Sampling
from petune.runner.continued import history
from petune.runner.file_names import MANIFEST_FILE
from petune.runner.migrations import read_record
from petune.runner.run_adapter import InitialValues
from petune.runner.run_config import RunConfig
from petune.runner.run_data import backbone_channels
from petune.runner.split_options import split_options
from petune.runner.trained import Trained
from petune.training.task_registry import describe_task

ADAPTER_DIR = "adapter"


def save_adapter(trained: Trained, test: SplitMetrics) -> int:
    """Save the adapter of a run in its directory and return the size of the tensors in bytes."""
    path = trained.run_dir / ADAPTER_DIR
    trained.ready.attachment.save(path, metadata=adapter_metadata(trained, test))
    return (path / "adapter_model.safetensors").stat().st_size


def adapter_metadata(trained: Trained, test: SplitMetrics) -> dict[str, Any]:
    """Return what `petune predict` and a model card need to know about a run."""
    ready, fit = trained.ready, trained.fit
    config, dataset, preprocess = ready.config, ready.dataset, ready.preprocess
    channels = backbone_channels(config, dataset)
    return {
        "method": config.method,
        "backbone": _describe_backbone(config, ready.backbone, ready.initial_values, channels),
        "classes": list(dataset.classes),
        "task": describe_task(ready.task),
        "num_outputs": ready.task.num_outputs(),
        "preprocess": {
            "image_size": preprocess.image_size,
            "mean": preprocess.mean,
            "std": preprocess.std,
            "stored_size": dataset.test.images.shape[-2],
            "crop": dataset.test.crop,
            "channels": dataset.test.images.shape[-1],
            "dtype": str(dataset.test.images.dtype),
            **_describe_clips(dataset),
        },
        "dataset": config.dataset,
        SPLIT_OPTIONS: split_options(config),
        **({"dataset_license": dataset.license} if dataset.license else {}),
        **({"dataset_citation": dataset.citation} if dataset.citation else {}),
        "images": digests(read_record(trained.run_dir / MANIFEST_FILE)),
        **({"kept_splits": True} if dataset.kept_splits else {}),
        "training": {
            "val_metrics": fit.val.report(trained.metric_info) if fit.val else None,
            "epochs": len(fit.epochs),
            "learning_rate": fit.lr,
            "batch_size": config.train.batch_size,
            "seed": config.seed,
            "precision": fit.precision,
            **({"final_fit": trained.final_fit} if trained.final_fit else {}),
        },
        "test": {"metrics": test.report(trained.metric_info), "num_images": test.num_images},
        "metric_info": [metric.model_dump() for metric in trained.metric_info],
        **({"continued_from": history(ready.start)} if ready.start else {}),
    }


def _describe_clips(dataset: Dataset) -> dict[str, Any]:
    """Return how the frames of a clip, and the clips of a video in tests, are chosen; empty for images."""
    split, tested = dataset.train, dataset.test.images
    if split.num_frames is None:
        return {}
    sampling = split.images.sampling if isinstance(split.images, Clips) else Sampling("uniform", split.num_frames)
    # a test with three crops stores other squares
    views = {"views": asdict(tested.views)} if isinstance(tested, Clips) and len(tested.views) > 1 else {}
    return {"clip": asdict(sampling), "stored_size": split.images.shape[-2], "crop": split.crop, **views}


def _describe_backbone(
    config: RunConfig, backbone: Backbone, initial: InitialValues, channels: int | None
) -> dict[str, Any]:
    return {
        "name": config.backbone,
        "full_name": backbone.full_name,
        "hub_id": backbone.hub_id,
        "license": backbone.license,
        "weights": backbone.weights,
        "weights_option": absolute_weights(config.weights),
        "seed": initial.seed,
        "initial_classes": initial.num_classes,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "options": config.backbone_options,
        "head": config.head,
        **({"base_precision": config.base_precision} if config.base_precision != "auto" else {}),
        **({"channels": channels} if channels is not None else {}),
        **({"num_frames": backbone.num_frames} if backbone.num_frames is not None else {}),
    }
