"""One run: a method on a backbone and a dataset, trained, chosen on val, tested once, saved. The main path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from petune.backbones.create import Backbone, check_weights, create_backbone, input_side
from petune.backbones.weights import absolute_weights, load_adapters
from petune.base.arguments import check_watch
from petune.base.distributed import SINGLE_PROCESS, Group, init_group
from petune.data import Dataset, Preprocess, load_dataset
from petune.data.manifest import MANIFEST_FILE, digests
from petune.injector.attach import attach
from petune.injector.attachment import Attachment
from petune.injector.registry import build_tuner
from petune.injector.tuner import Recipe, Tuner
from petune.runner.provenance import PeakMemory, forward_flops, git_state, provenance
from petune.runner.result import RunResult
from petune.runner.run_config import RunConfig
from petune.runner.run_dir import noted, open_run_dir, unique_path
from petune.runner.run_inputs import check_inputs
from petune.runner.run_name import run_name
from petune.training.config import TrainConfig
from petune.training.evaluate import Accuracy, load_accuracy
from petune.training.events import Event, Note
from petune.training.job import TrainJob
from petune.training.loop import Trainer
from petune.training.precision import choose_device
from petune.training.progress import FitResult
from petune.training.stop import StopFlag

Watch = Callable[[Event], None]


def run(config: RunConfig | None = None, *, watch: Watch = lambda event: None, **fields: Any) -> RunResult:
    """Run `config`, or the RunConfig that `fields` make: `petune.run(method="vpt", dataset="digits")`.

    Args:
        config: The run.
        watch: Told of every step, epoch and note.

    Several processes that torchrun or `accelerate launch` started do one run together: see `petune.group`. Each returns
    the result; the first one alone writes, and calls `watch`.

    Raises:
        PetuneError: With one message; see petune.errors for which.
    """
    check_watch("petune.run", watch)
    config = RunConfig.from_call(config, fields, "petune.run(...)")
    tuner = build_tuner(config.method)
    group = init_group()
    if config.output is None or not RunResult.exists(config.output):
        group.main_first(lambda: check_weights(config.backbone, config.weights))
    place = group.broadcast(lambda: config.output or unique_path(Path("runs") / run_name(config)))
    claim = open_run_dir(place, config, resume=config.resume, command="petune run --config config.yaml")
    with group.on_main(claim), StopFlag() as stop:
        finished = group.broadcast(lambda: RunResult.read(place) if RunResult.exists(place) else None)
        if finished is not None:
            return finished
        done = trained(config, tuner, place, stop, watch, group)
        test = done.trainer.evaluate("test")
        peak = max(done.memory.bytes(), done.trainer.progress.peak_bytes)
        flops = forward_flops(done.attachment.model, (3, done.backbone.image_size, done.backbone.image_size))

        def finish() -> RunResult:
            card = _card(config, done, test, place)
            done.attachment.save(place / "adapter", metadata=card)
            size = (place / "adapter" / "adapter_model.safetensors").stat().st_size
            result = run_result(config, done.backbone, done.attachment, done.fitted, test, place, peak, size, flops)
            return result.write(place)

        return group.broadcast(finish)


@dataclass(frozen=True)
class Prepared:
    """All that a training needs: the options filled in, the images, the model with the method on it."""

    train: TrainConfig
    dataset: Dataset
    backbone: Backbone
    attachment: Attachment
    device: torch.device
    memory: PeakMemory


@dataclass(frozen=True)
class Trained:
    """A run up to its test, which has not been read; the model holds the epoch chosen on val."""

    dataset: Dataset
    backbone: Backbone
    attachment: Attachment
    trainer: Trainer
    fitted: FitResult
    memory: PeakMemory


def trained(
    config: RunConfig, tuner: Tuner[Any], place: Path, stop: StopFlag, watch: Watch, group: Group = SINGLE_PROCESS
) -> Trained:
    """Train in the directory `place`, which the caller holds, from its newest checkpoint where there is one."""
    watch = watch if group.is_main else lambda event: None
    ready = prepared(config, tuner, tuner.recipe, place, stop, watch, group)
    dataset, backbone, attachment, memory = ready.dataset, ready.backbone, ready.attachment, ready.memory
    if note := statistics_note(backbone):
        watch(Note(note))
    watch(Note(what_trains(attachment)))
    job = TrainJob(
        attachment=attachment,
        dataset=dataset,
        preprocess=preprocessing(backbone, dataset),
        config=ready.train,
        device=ready.device,
        directory=place,
        seed=config.seed,
    )
    trainer = Trainer(job, stop=stop, on_event=watch, group=group, peak_bytes=memory.bytes)
    if note := trainer.batches.note():
        watch(Note(note))
    return Trained(dataset, backbone, attachment, trainer, trainer.fit(), memory)


def prepared(
    config: RunConfig,
    tuner: Tuner[Any],
    recipe: Recipe,
    place: Path,
    stop: StopFlag,
    watch: Watch,
    group: Group,
    *,
    keep_head: bool = False,
) -> Prepared:
    """Read the images, build the backbone with its weights, attach; a signal stops this at once."""
    git_state()  # of the code that trains, whatever is committed meanwhile
    with stop.immediately(group):
        load_accuracy()
        device = group.device(choose_device(config.device))
        dataset = group.main_first(lambda: prepare_data(config))
        train = with_recipe(config.train, recipe, dataset)
        options = {config.method: tuner.config}
        group.broadcast(lambda: check_inputs(place, config.dataset, config.weights, filled_in(train), options))
        backbone = group.main_first(lambda: prepare_backbone(config, dataset, keep_head=keep_head))
        watch(Note(f"{backbone.full_name}, weights {backbone.weights}; {dataset.name} from {dataset.source}"))
        memory = PeakMemory(device)
        torch.manual_seed(config.seed)  # adapters start the same whatever drew before
        attachment = attach(backbone.model.to(device), tuner, name=tuner.method, keep_original=False)
        if backbone.file is not None and backbone.file.adapters:
            load_adapters(attachment.model, backbone.file, config.method)
    return Prepared(train, dataset, backbone, attachment, device, memory)


def statistics_note(backbone: Backbone) -> str | None:
    """What to tell of a weights file that does not say how its images were normalised."""
    if backbone.file is None or backbone.mean is not None:
        return None
    return f"{backbone.weights} does not say what its images' mean and std were; this dataset's are taken"


def prepare_data(config: RunConfig) -> Dataset:
    """The dataset with val cut (always the same one, whatever the seed) and few-shot drawn by the seed."""
    side = input_side(config.backbone, config.image_size, config.backbone_options)
    dataset = load_dataset(config.dataset, config.data_dir, side, config.on_broken)
    dataset = dataset.with_val(config.val_fraction, seed=0)
    if config.shots is not None:
        dataset = dataset.with_shots(config.shots, config.seed)
    return dataset


def prepare_backbone(config: RunConfig, dataset: Dataset, *, keep_head: bool = False) -> Backbone:
    """The backbone with its weights and a fresh head for the dataset (or the weights' own, if of the same classes)."""
    return create_backbone(
        config.backbone,
        weights=config.weights,
        num_classes=dataset.num_classes,
        image_size=config.image_size,
        patch_size=config.patch_size,
        options=config.backbone_options,
        head=config.head,
        seed=config.seed,
        keep_head_of=dataset.classes if keep_head else None,
    )


def preprocessing(backbone: Backbone, dataset: Dataset) -> Preprocess:
    """The statistics that the weights were trained with; the dataset's own where there are none."""
    if backbone.mean and backbone.std:
        return Preprocess(backbone.image_size, backbone.mean, backbone.std)
    return Preprocess(backbone.image_size, *dataset.train.channel_statistics())


def with_recipe(train: TrainConfig, recipe: Recipe, dataset: Dataset) -> TrainConfig:
    """`train` with every None filled in from the method's recipe and the dataset."""
    filled = {
        "lr": recipe.lr if train.lr is None else train.lr,
        "weight_decay": recipe.weight_decay if train.weight_decay is None else train.weight_decay,
        "optimizer": train.optimizer or recipe.optimizer,
        "augment": dataset.augment if train.augment == "auto" else train.augment,
    }
    return train.model_copy(update=filled)


def filled_in(train: TrainConfig) -> dict[str, Any]:
    """What `with_recipe` fills in, by name."""
    return train.model_dump(mode="json", include={"lr", "weight_decay", "optimizer", "augment"})


def what_trains(att: Attachment) -> str:
    """A sentence with the numbers of trained parameters."""
    counts = att.counts
    return (
        f"{counts.tuned:,} tuned and {counts.head:,} head parameters train ({counts.percent_of_backbone:.3f} % of "
        f"backbone and head, {counts.percent_of_total:.3f} % of all)"
    )


def run_result(
    config: RunConfig,
    backbone: Backbone,
    att: Attachment,
    fitted: FitResult,
    test: Accuracy,
    place: Path,
    peak_bytes: int,
    saved_bytes: int,
    flops: int,
) -> RunResult:
    """All that is known of a finished run, in one row."""
    counts = att.counts
    return RunResult(
        method=config.method,
        backbone=config.backbone,
        backbone_full_name=backbone.full_name,
        weights=backbone.weights,
        dataset=config.dataset,
        seed=config.seed,
        top1=test.top1,
        top5=test.top5,
        val_top1=fitted.val.top1 if fitted.val else None,
        epoch=fitted.epoch,
        epochs=len(fitted.epochs),
        lr=fitted.lr,
        tuned=counts.tuned,
        head=counts.head,
        total=counts.total,
        percent_of_total=counts.percent_of_total,
        percent_of_backbone=counts.percent_of_backbone,
        forward_flops=flops,
        adapter_bytes=saved_bytes,
        images_per_s=fitted.images_per_s,
        step_time_s=fitted.step_time_s,
        peak_memory_bytes=peak_bytes,
        time_s=fitted.time_s,
        output=str(place),
        provenance=provenance(next(att.model.parameters()).device)
        | {
            "precision": fitted.precision,
            "micro_batch_size": fitted.micro_batch_size,
            "num_processes": fitted.num_processes,
        },
    )


def _card(config: RunConfig, done: Trained, test: Accuracy, place: Path) -> dict[str, Any]:
    """What the adapter directory says beyond the adapter: enough to build the backbone again and to name classes."""
    backbone, dataset, preprocess, fitted = done.backbone, done.dataset, done.trainer.job.preprocess, done.fitted
    return {
        "method": config.method,
        "backbone": {
            "name": config.backbone,
            "full_name": backbone.full_name,
            "hub_id": backbone.hub_id,
            "weights": backbone.weights,
            "weights_option": absolute_weights(config.weights),
            "seed": config.seed,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "options": config.backbone_options,
            "head": config.head,
        },
        "classes": list(dataset.classes),
        "preprocess": {
            "image_size": preprocess.image_size,
            "mean": preprocess.mean,
            "std": preprocess.std,
            "stored_size": dataset.test.images.shape[1],
            "crop": dataset.test.crop,
        },
        "dataset": dataset.name,
        "images": digests(noted(place / MANIFEST_FILE)),
        "training": {
            "val_top1": fitted.val.top1 if fitted.val else None,
            "epochs": len(fitted.epochs),
            "learning_rate": fitted.lr,
            "batch_size": config.train.batch_size,
            "seed": config.seed,
            "precision": fitted.precision,
        },
        "test": {"top1": test.top1, "top5": test.top5, "num_images": test.num_images},
    }
