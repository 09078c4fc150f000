"""Pretraining from scratch: everything trains, the last epoch is kept, the result is a `--weights` for `run`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, model_validator
from safetensors.torch import save as save_tensors
from torch import nn

from petune.backbones.create import Backbone
from petune.backbones.weights import BACKBONE_FILE
from petune.base.arguments import check_watch
from petune.base.distributed import init_group
from petune.base.errors import ConfigError
from petune.base.files import replace_file
from petune.data.batches import Preprocess
from petune.data.dataset import Dataset
from petune.injector.attachment import Attachment
from petune.injector.registry import build_tuner
from petune.injector.tuner import Recipe
from petune.runner.provenance import forward_flops, provenance
from petune.runner.result import RunResult
from petune.runner.run import (
    Watch,
    prepared,
    preprocessing,
    run_result,
    statistics_note,
)
from petune.runner.run_config import RunConfig
from petune.runner.run_dir import open_run_dir, unique_path
from petune.runner.run_name import directory_name
from petune.training.config import TrainConfig
from petune.training.evaluate import Accuracy
from petune.training.events import Note
from petune.training.job import TrainJob
from petune.training.loop import Trainer
from petune.training.stop import StopFlag

# Muon orthogonalises the momentum of every matrix (Jordan et al., 2024). After one epoch of CIFAR-100 at equal
# cost vit_nano reached 25.5 % with it; the first trial with AdamW needed 28 epochs for 45.6 %.
RECIPE = Recipe(lr=2e-3, weight_decay=0.05, optimizer="nmuon")


class PretrainTraining(TrainConfig):
    """TrainConfig with the defaults of pretraining; they hold beside values that are given."""

    epochs: int = Field(30, ge=1, le=100_000)
    label_smoothing: float = Field(0.1, ge=0, lt=1)


class PretrainConfig(RunConfig):
    """All that decides a pretraining run: a RunConfig with other defaults.

    Attributes:
        weights: `none` starts from random weights; a path goes on from there, with its head where the classes agree.
        method: What trains, which must be everything: `full`, or adapters that are there from the start, with the
            backbone (`adaptformer:train_backbone=true`). Such weights are for runs with the same adapters.
        mean, std: What images are normalised by, also in runs with these weights; None measures the training split.
        dtype: Number format of `backbone.safetensors`.
    """

    method: str = "full"
    backbone: str = "vit_nano"
    weights: str = "none"
    dataset: str = "cifar100"
    val_fraction: float = Field(0.02, gt=0, lt=1)
    mean: tuple[float, float, float] | None = None
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    dtype: Literal["fp32", "fp16"] = "fp32"
    train: PretrainTraining = PretrainTraining.model_construct()

    @model_validator(mode="after")
    def _mean_with_std(self) -> Self:
        if (self.mean is None) != (self.std is None):
            given, missing = ("std", "mean") if self.mean is None else ("mean", "std")
            raise ValueError(f"mean and std must be given together, but there is {given} without {missing}")
        return self


def pretrain(config: PretrainConfig | None = None, *, watch: Watch = lambda event: None, **fields: Any) -> RunResult:
    """Train a backbone from scratch; `output` then holds `backbone.safetensors`.

    Args:
        config: The run; without it `fields` make one.
        watch: Told of every step, epoch and note.

    Raises:
        PetuneError: With one message; see petune.errors for which.
    """
    check_watch("petune.pretrain", watch)
    config = PretrainConfig.from_call(config, fields, "petune.pretrain(...)")
    tuner = build_tuner(config.method)
    group = init_group()
    place = group.broadcast(lambda: config.output or unique_path(Path("runs") / pretrain_name(config)))
    claim = open_run_dir(place, config, resume=config.resume, command="petune pretrain --config config.yaml")
    with group.on_main(claim), StopFlag() as stop:
        finished = group.broadcast(lambda: RunResult.read(place) if RunResult.exists(place) else None)
        if finished is not None:
            return finished
        watch = watch if group.is_main else lambda event: None
        ready = prepared(config, tuner, RECIPE, place, stop, watch, group, keep_head=True)
        attachment, backbone, dataset = ready.attachment, ready.backbone, ready.dataset
        check_all_trains(attachment.counts.total - attachment.counts.trainable, config.method)
        adapters = _adapters(attachment)
        if config.mean is None and (note := statistics_note(backbone)):
            watch(Note(note))
        preprocess = _preprocessing(config, backbone, dataset)
        job = TrainJob(
            attachment=attachment,
            dataset=dataset,
            preprocess=preprocess,
            config=ready.train,
            device=ready.device,
            directory=place,
            seed=config.seed,
            keep="last",
        )
        trainer = Trainer(job, stop=stop, on_event=watch, group=group, peak_bytes=ready.memory.bytes)
        if note := trainer.batches.note():
            watch(Note(note))
        fitted = trainer.fit()
        test = trainer.evaluate("test")
        info = _described(config, backbone, preprocess, dataset, test)
        info |= {"adapters": adapters, "provenance": provenance(ready.device)}
        peak = max(ready.memory.bytes(), trainer.progress.peak_bytes)
        flops = forward_flops(attachment.model, (3, backbone.image_size, backbone.image_size))

        def finish() -> RunResult:
            size = _save(attachment.model, place, info, config.dtype)
            return run_result(config, backbone, attachment, fitted, test, place, peak, size, flops).write(place)

        return group.broadcast(finish)


def pretrain_name(config: PretrainConfig) -> str:
    """The directory name of a pretraining that names none."""
    return directory_name("pretrain", config.backbone, config.dataset, f"seed{config.seed}")


def check_all_trains(frozen: int, method: str) -> None:
    """Refuse a method that leaves parameters as they are.

    Raises:
        ConfigError: `frozen`, how many those are, is not 0.
    """
    if frozen:
        raise ConfigError(
            f"pretraining trains everything, but {method} leaves {frozen:,} parameters as they are; use full, or a "
            "method that trains the backbone too"
        )


def _adapters(attachment: Attachment) -> list[str]:
    """The keys of what was not there before attaching."""
    added = {id(t) for t in attachment.edit_log.new_tensors()}
    return sorted(key for key, t in attachment.model.state_dict(keep_vars=True).items() if id(t) in added)


def _preprocessing(config: PretrainConfig, backbone: Backbone, dataset: Dataset) -> Preprocess:
    usual = preprocessing(backbone, dataset)
    return replace(usual, mean=config.mean, std=config.std) if config.mean and config.std else usual


def _described(
    config: PretrainConfig, backbone: Backbone, preprocess: Preprocess, dataset: Dataset, test: Accuracy
) -> dict[str, Any]:
    """What the weights file says of itself."""
    return {
        "backbone": config.backbone,
        "full_name": backbone.full_name,
        "mean": preprocess.mean,
        "std": preprocess.std,
        "image_size": preprocess.image_size,
        "classes": dataset.classes,
        "method": config.method,
        "top1": test.top1,
        "top5": test.top5,
        "config": config.model_dump(mode="json"),
    }


def _save(model: nn.Module, place: Path, info: dict[str, Any], dtype: str) -> int:
    half = dtype == "fp16"
    tensors = {
        # copied, since safetensors refuses weights that share memory
        key: (t.half() if half and t.is_floating_point() else t).detach().to("cpu", copy=True).contiguous()
        for key, t in model.state_dict().items()
    }
    content = save_tensors(tensors, metadata={"petune": json.dumps(info)})
    replace_file(place / BACKBONE_FILE, content)
    return len(content)
