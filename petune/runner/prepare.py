"""Build what a training needs from a configuration: images, backbone, method, training options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from petune.adapters.format import SavedAdapter
from petune.backbones.create import Backbone, create_backbone, input_side
from petune.backbones.weights import load_adapters
from petune.base.distributed import SINGLE_PROCESS, Group
from petune.base.errors import ConfigError
from petune.base.plugins import plugin_errors
from petune.base.text import plural
from petune.data import Dataset, Preprocess
from petune.data.merge import merge_val
from petune.data.statistics import Statistics
from petune.injector.attach import attach
from petune.injector.attachment import Attachment
from petune.injector.load import has_other_head, start_from
from petune.injector.tuner import Recipe, Tuner
from petune.runner.backbone_dropout import choose_backbone_dropout
from petune.runner.check_options import check_head, check_layer_decay
from petune.runner.continued import check_same_model, describe_start, keep_head_state, keeps_head, tensors_digest
from petune.runner.input_tokens import warn_of_tokens
from petune.runner.kept_splits import record_splits
from petune.runner.provenance import PeakMemory, record_git_state
from petune.runner.recipes import complete_options
from petune.runner.run_adapter import InitialValues, read_run_adapter
from petune.runner.run_config import RunConfig
from petune.runner.run_data import backbone_channels, check_unseen, note_of_clips, prepare_data
from petune.runner.run_inputs import RunInputs, check_inputs
from petune.runner.run_preprocess import choose_preprocess
from petune.sites.file_values import settle
from petune.sites.find import find_sites
from petune.training.batch_loss import check_task_options
from petune.training.chosen_metric import check_chosen_metric
from petune.training.config import TrainConfig
from petune.training.events import Note, Watch, ignore
from petune.training.precision import choose_device, choose_precision
from petune.training.stop import StopFlag
from petune.training.task import Task
from petune.training.task_registry import TASKS, describe_task, fitted_task


@dataclass(frozen=True)
class RunContext:
    """A run's directory, its stop flag, its watcher, and the processes that share the work."""

    run_dir: Path
    stop: StopFlag
    watch: Watch = ignore
    group: Group = SINGLE_PROCESS

    def note(self, text: str) -> None:
        """Show a sentence to the person who runs this, once per run; an empty one is not shown."""
        if text and self.group.is_main:
            self.watch(Note(text))


@dataclass(frozen=True)
class Prepared:
    """Everything that a training needs.

    Attributes:
        config: As asked for.
        train: The training options of `config`, completed from recipe and dataset.
        dataset: With its val split.
        task: Fitted to the training split.
        backbone, attachment: The model with its weights, on `device`, and the method on it.
        preprocess: From stored pixels to the backbone's input.
        memory: Measures the peak from here on.
        start: The adapter that the run continues from, if it does.
    """

    config: RunConfig
    train: TrainConfig
    dataset: Dataset
    task: Task[Any]
    backbone: Backbone
    attachment: Attachment
    preprocess: Preprocess
    device: torch.device
    memory: PeakMemory
    start: SavedAdapter | None = None

    @property
    def initial_values(self) -> InitialValues:
        """The seed and the size that the backbone's random values depend on."""
        return initial_values(self.config, self.task, self.start)


@dataclass(frozen=True)
class _Images:
    """The images of a run, and what follows from them before there is a model; see `Prepared`.

    Attributes:
        splits: The dataset as it is divided, before val may have been added to train.
    """

    config: RunConfig
    train: TrainConfig
    dataset: Dataset
    splits: Dataset
    task: Task[Any]
    start: SavedAdapter | None


def prepare(
    config: RunConfig,
    tuner: Tuner[Any],
    recipe: Recipe,
    context: RunContext,
    *,
    keep_head: bool = False,
    statistics: Statistics | None = None,
    with_val: bool = False,
) -> Prepared:
    """Read the images, build the backbone with its weights and attach the method. A signal interrupts this at once.

    Args:
        config: The run.
        tuner: The method of `config`, built.
        recipe: Fills in the training options that `config` leaves open.
        context: The run directory, and the processes.
        keep_head: Keep the classifier of the weights where it has the dataset's classes.
        statistics: Normalize images by these; None takes the backbone's, or else measures the training split.
        with_val: Train on val too.
    """
    record_git_state()
    group = context.group
    with context.stop.immediately(group):
        device = group.device(choose_device(config.device))
        images = _prepare_images(config, recipe, context, device, with_val=with_val)
        inputs = _inputs(images, tuner)
        group.broadcast(lambda: check_inputs(context.run_dir, inputs))
        if not with_val or config.final_fit == "only":
            group.broadcast(lambda: record_splits(context.run_dir, config, images.splits))
        backbone = _prepare_model(images, tuner, context, device, keep_head=keep_head)
        memory = PeakMemory(device)
        attachment = _attach(config, tuner, backbone, device, context)
        if images.start is not None:
            statistics = _continue(attachment, images.start, images.task, context)
        settle(attachment.model.parameters())
    if statistics is None and backbone.file is not None and backbone.mean is None:
        context.note(f"{backbone.weights} does not record mean and std of its images; this dataset's are used")
    train, dataset, task, start = images.train, images.dataset, images.task, images.start
    preprocess = choose_preprocess(backbone, dataset, statistics, attachment.sites.input_size[-3])
    return Prepared(config, train, dataset, task, backbone, attachment, preprocess, device, memory, start)


def _prepare_images(
    config: RunConfig, recipe: Recipe, context: RunContext, device: torch.device, *, with_val: bool
) -> _Images:
    """Read the images and fit the task to them; complete the training options, and check them."""
    group = context.group
    splits = group.main_first(lambda: prepare_data(config, context.run_dir))
    if config.from_run is not None:
        group.main_first(lambda: check_unseen(config, splits))
    dataset = merge_val(splits) if with_val else splits
    task = fitted_task(config.task, dataset)
    context.note(check_chosen_metric(task, config.train.choose, dataset.val, device))
    side = input_side(config.backbone, config.image_size, config.backbone_options)
    train = complete_options(config.train, recipe, dataset, side)
    check_task_options(task, train, dataset.train, group.size)
    check_head(config.head, train)
    return _Images(config, train, dataset, splits, task, read_start(config))


def _inputs(images: _Images, tuner: Tuner[Any]) -> RunInputs:
    """Return what the run directory records."""
    config, start = images.config, images.start
    return RunInputs(
        config.dataset,
        config.weights,
        config.data_dir,
        recipe=images.train.model_dump(mode="json", include={"lr", "weight_decay", "optimizer", "augment"}),
        methods={config.method: tuner.config},
        from_run=tensors_digest(start) if start else "",
        task={key: value for key, value in describe_task(images.task).items() if key != "state"},
    )


def _prepare_model(
    images: _Images, tuner: Tuner[Any], context: RunContext, device: torch.device, *, keep_head: bool
) -> Backbone:
    """Build the backbone with its weights, and note what a user should know of it."""
    config, dataset, group = images.config, images.dataset, context.group
    channels = backbone_channels(config, dataset)
    build = partial(
        prepare_backbone,
        task=images.task,
        initial=initial_values(config, images.task, images.start),
        channels=channels,
        num_frames=dataset.train.num_frames,
    )
    if images.train.layer_decay is not None:
        check_layer_decay(config, tuner, images.train.layer_decay, build)
    alone = group.size == 1 and device.type == "cpu" and not keep_head
    stays = alone and choose_precision(images.train.precision, device) == "bf16"
    backbone = group.main_first(lambda: build(config, keep_head=keep_head, stay_in_file=stays))
    context.note(f"{backbone.full_name}, weights {backbone.weights}; {dataset.name} from {dataset.source}")
    context.note(_note_of_channels(channels, backbone))
    context.note(dataset.few_test_images_note())
    context.note(note_of_clips(backbone))
    context.note(warn_of_tokens(config, backbone.sites or find_sites(backbone.model)) if config.image_size else "")
    return backbone


def _attach(
    config: RunConfig, tuner: Tuner[Any], backbone: Backbone, device: torch.device, context: RunContext
) -> Attachment:
    """Attach the method on the device, with the adapters that the weights file has."""
    torch.manual_seed(config.seed)  # adapters start the same, whatever was drawn before
    attachment = attach(backbone.model.to(device), tuner, sites=backbone.sites, name=tuner.method, keep_original=False)
    choose_backbone_dropout(attachment, config.drop_rates, context.note)
    if backbone.file is not None and backbone.file.adapters:
        load_adapters(attachment.model, backbone.file, config.method)
    return attachment


def read_start(config: RunConfig) -> SavedAdapter | None:
    """Return the adapter that a run continues from, if it does.

    Raises:
        CheckpointError: It is missing or damaged.
        ConfigError: It has another method or backbone than `config`.
    """
    if config.from_run is None:
        return None
    saved = read_run_adapter(config.from_run)
    check_same_model(config, saved)
    return saved


def initial_values(config: RunConfig, task: Task[Any], start: SavedAdapter | None) -> InitialValues:
    """Return what the backbone's random values depend on: as in the first of the runs that continue each other."""
    if start is None:
        return InitialValues(config.seed, task.num_outputs())
    return InitialValues.of(start)


def _continue(attachment: Attachment, start: SavedAdapter, task: Task[Any], context: RunContext) -> Statistics:
    """Start from an adapter's values and its head's state; return the statistics that its images were normalized by."""
    with_head = keeps_head(start, task)
    if with_head and task.has_own_head and has_other_head(attachment, start):
        with_head = False
        context.note("its head is not continued, because options of the task gave it another shape")
    start_from(attachment, start, with_head=with_head)
    if with_head:
        keep_head_state(task, start)
    classifier = "with its classifier" if with_head else "with a new classifier, because the classes differ"
    context.note(f"continues from {describe_start(start)}, {classifier}")
    recorded = start.config["metadata"]["preprocess"]
    return tuple(recorded["mean"]), tuple(recorded["std"])


def _note_of_channels(channels: int | None, backbone: Backbone) -> str:
    if channels is None or backbone.weights == "none":
        return ""
    return (
        f"the images have {plural(channels, 'channel')}: the patch embedding of the weights is adapted from RGB, as "
        "timm does, and stays frozen unless the method trains it"
    )


def prepare_backbone(
    config: RunConfig,
    task: Task[Any],
    initial: InitialValues,
    channels: int | None = None,
    num_frames: int | None = None,
    *,
    keep_head: bool = False,
    stay_in_file: bool = False,
) -> Backbone:
    """Create the backbone with its weights and a new head for the task.

    Args:
        config: The run.
        task: Sets the outputs of the head.
        initial: What its random values depend on.
        channels: See `backbone_channels`.
        num_frames: Frames of a clip; None for images.
        keep_head: Keep the head of the weights where it has the same classes.
        stay_in_file: Read frozen weights only when they are converted to bfloat16; see `create_backbone`.
    """
    backbone = create_backbone(
        config.backbone,
        weights=config.weights,
        num_classes=task.num_outputs(),
        image_size=config.image_size,
        patch_size=config.patch_size,
        options=config.options_to_build,
        head=config.head,
        seed=initial.seed,
        initial_classes=initial.num_classes,
        keep_head_of=(task.target.classes or None) if keep_head and not task.has_own_head else None,
        channels=channels,
        num_frames=num_frames,
        stay_in_file=stay_in_file,
        base_precision=config.base_precision,
    )
    return with_head_of(task, backbone, initial.seed)


def with_head_of(task: Task[Any], backbone: Backbone, seed: int) -> Backbone:
    """Return the backbone with the head of a task.

    Raises:
        PluginError: The task of a plugin fails.
        ConfigError: The task has a head for images, and the backbone takes clips.
    """
    if task.has_own_head and backbone.num_frames is not None:
        raise ConfigError(
            f"the task {task.name} has a head for images, and {backbone.name} takes clips. Use a task with one target "
            "for a clip: classification, multi_label or regression"
        )
    with plugin_errors(TASKS, task.name, type(task), "added its head"):
        model = task.add_head(backbone.model, seed)
    return replace(backbone, model=model, sites=None if task.has_own_head else backbone.sites)
