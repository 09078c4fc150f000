"""One run: train a method on a backbone and a dataset, choose the epoch on val, test once, save. The main path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from petune.backbones.create import check_weights
from petune.backbones.input_channels import RGB_CHANNELS
from petune.backbones.quantize import check_base_precision
from petune.base.arguments import check_watch
from petune.base.distributed import init_group
from petune.base.errors import ConfigError
from petune.base.files import replace_file
from petune.base.metric import SplitMetrics
from petune.data.lookup import dataset_target
from petune.data.statistics import Statistics
from petune.data.steps import check_images
from petune.injector.counts import Counts
from petune.injector.registry import build_tuner
from petune.injector.tuner import Recipe, Tuner
from petune.runner.adapter_metadata import save_adapter
from petune.runner.directory_kind import check_kind
from petune.runner.file_names import FIRST_BATCH_FILE
from petune.runner.final_fit import Chosen, make_final_dir, note_of_one_fit
from petune.runner.make_result import make_result, measure
from petune.runner.prepare import RunContext, prepare
from petune.runner.recipes import choose_recipe, complete_run
from petune.runner.report.seen_images import first_batch
from petune.runner.report.tiles import galleries_file
from petune.runner.result import RunResult
from petune.runner.run_config import RunConfig
from petune.runner.run_data import check_clips, has_final_fit
from petune.runner.run_dir import latest_path, make_unique_dir, open_run_dir
from petune.runner.run_name import run_name
from petune.runner.test_values import write_test_values
from petune.runner.trained import Trained
from petune.training.batch_loss import check_task_config
from petune.training.config import AUTO
from petune.training.events import Watch, ignore
from petune.training.job import TrainJob
from petune.training.loop import Trainer
from petune.training.stop import StopFlag
from petune.training.task import choose_metrics
from petune.training.task_registry import task_for


def run(config: RunConfig | None = None, *, watch: Watch = ignore, **fields: Any) -> RunResult:
    """Train a method and test it once: `petune.run(method="vpt", dataset="digits")`.

    `petune.run(from_run="runs/pets", dataset="folder:birds")` continues from a finished run, with a fresh optimizer.

    Several processes started by torchrun or `accelerate launch` do one run together. Each of them returns the result;
    the first one writes the files and calls `watch`.

    Args:
        config: The run; without it, `fields` are those of a RunConfig.
        watch: Called with every step, epoch and note.

    Raises:
        PetuneError: See `petune.base.errors` for its kinds.
    """
    check_watch("petune.run", watch)
    config = complete_run(RunConfig.from_call(config, fields, "petune.run(...)"))
    return train_and_test(config, fine_tuning(config), watch)


@dataclass(frozen=True)
class Procedure:
    """Differences between `run` and `pretrain`.

    Attributes:
        command: The command's name, `run` or `pretrain`.
        name: The run directory's name, if the configuration sets no output.
        tuner: The method, built.
        recipe: Fills in the training options that the configuration leaves open.
        save: Writes what was trained and returns its size in bytes.
        keep: The epoch to keep: the best one on val, or the last one.
        keep_head: Start from the weights' own classifier where it has the dataset's classes.
        statistics: Mean and std to normalize images by; None takes the backbone's or the dataset's.
        trains_all: Refuse a method that leaves parameters frozen.
    """

    command: str
    name: str
    tuner: Tuner[Any]
    recipe: Recipe
    save: Callable[[Trained, SplitMetrics], int]
    keep: Literal["best", "last"] = "best"
    keep_head: bool = False
    statistics: Statistics | None = None
    trains_all: bool = False


def fine_tuning(config: RunConfig) -> Procedure:
    """Return the procedure of `run`: the method's own recipe, the best epoch, an adapter directory."""
    tuner = build_tuner(config.method)
    return Procedure("run", run_name(config), tuner, choose_recipe(tuner, config.recipe), save_adapter)


def train_and_test(config: RunConfig, procedure: Procedure, watch: Watch) -> RunResult:
    """Train, test once and save in one run directory; return the result of a run that was finished before."""
    config.check_one_fold()
    config.check_final_fit()
    group = init_group()
    default_dir = Path("runs") / procedure.name
    if config.output is None and config.resume:
        config = config.model_copy(update={"output": group.broadcast(lambda: latest_path(default_dir))})
    if config.output is not None:
        group.broadcast(partial(check_kind, config.output, procedure.command))
    if config.output is None or not RunResult.exists(config.output):
        # names are checked before a hub is asked for weights
        group.main_first(lambda: check_task_of_dataset(config))
        group.main_first(lambda: check_base_precision(config.base_precision))
        group.main_first(lambda: check_weights(config.backbone, config.weights))
        group.main_first(lambda: check_clips(config))
    run_dir = group.broadcast(lambda: config.output or make_unique_dir(default_dir))
    opened = open_run_dir(run_dir, config, resume=config.resume, command=procedure.command)
    with group.on_main(opened), StopFlag() as stop:
        finished = group.broadcast(lambda: RunResult.read(run_dir) if RunResult.exists(run_dir) else None)
        if finished is not None:
            return finished
        context = RunContext(run_dir, stop, watch, group)
        trained = train(config, procedure, context, with_val=config.final_fit == "only")
        if trained.final_fit is None and procedure.keep == "best" and has_final_fit(config, trained.ready.dataset):
            chosen = Chosen(trained.fit, trained.ready.task.state)
            del trained  # both models need not fit into memory
            trained = train(config, procedure, context, chosen)
        measured = measure(trained)

        def save() -> RunResult:
            saved_bytes = procedure.save(trained, measured.test)
            write_first_batch(trained)
            write_test_values(run_dir, measured.test.image_values)
            return make_result(trained, measured, saved_bytes).write(run_dir)

        return group.broadcast(save)


def check_task_of_dataset(config: RunConfig) -> None:
    """Check names and options of task and dataset, and that they fit each other, without reading an image.

    Raises:
        UnknownName: There is no such task or dataset.
        ConfigError: An option is wrong, the task is for other targets, it has no metric of `train.choose`, or another
            head.
    """
    target = dataset_target(config.dataset, config.data_dir)
    task = task_for(config.task, target, config.dataset)
    choose_metrics(task, config.train.choose)
    check_task_config(task, config.train)
    if config.train.augment != AUTO:
        check_images(config.train.augment, config.channels or RGB_CHANNELS, masks=target.kind == "mask")
    if config.shots is not None and target.kind not in {"class", "multi_hot"}:
        raise ConfigError(
            f"shots counts images per class, and the targets of {config.dataset} are of kind {target.kind!r}. Leave "
            "shots out",
            cli_hint="Drop --shots",
        )
    if task.has_own_head and config.head != "linear":
        raise ConfigError(
            f"head={config.head} is a classifier, and the task {task.name} has a head of its own. Leave head out",
            cli_hint="Drop --head; a recipe that sets it, too",
        )


def train(
    config: RunConfig,
    procedure: Procedure,
    context: RunContext,
    chosen: Chosen | None = None,
    *,
    with_val: bool = False,
) -> Trained:
    """Train in an open run directory, from its newest checkpoint if there is one. The test split is not read.

    Args:
        config, procedure, context: The run.
        chosen: What val chose in a first training, for the second one, on train and val; see `final_fit`.
        with_val: Train on val too, for all epochs.
    """
    final_fit: Literal["train+val", "only"] | None = "train+val" if chosen is not None else "only" if with_val else None
    run_dir = context.run_dir
    if chosen is not None:
        context = make_final_dir(context)
    ready = prepare(
        config,
        procedure.tuner,
        procedure.recipe,
        context,
        keep_head=procedure.keep_head,
        statistics=procedure.statistics,
        with_val=final_fit is not None,
    )
    if chosen is not None:
        context.note(chosen.note(ready.dataset))
    elif with_val:
        context.note(note_of_one_fit(ready.dataset, ready.train.epochs))
    counts = ready.attachment.counts
    if procedure.trains_all:
        check_all_trains(counts.total - counts.trainable, config.method)
    context.note(describe_counts(counts))
    job = TrainJob(
        attachment=ready.attachment,
        task=ready.task,
        dataset=ready.dataset,
        preprocess=ready.preprocess,
        config=ready.train,
        device=ready.device,
        directory=context.run_dir,
        seed=config.seed,
        keep="last" if final_fit else procedure.keep,
        last_epoch=None if chosen is None else chosen.fit.epoch,
    )
    group = context.group
    trainer = Trainer(job, stop=context.stop, on_event=context.watch, group=group, peak_bytes=ready.memory.bytes)
    context.note(trainer.batches.note())
    fitted = ready.task.state
    fit = trainer.fit()
    if chosen is not None:
        fit = chosen.finish(fit, ready.task, fitted)
    return Trained(ready, trainer, fit, run_dir, final_fit=final_fit)


def write_first_batch(trained: Trained) -> None:
    """Write the first training images as the model saw them, for `petune report`."""
    gallery = first_batch(trained.trainer.batches, trained.ready.dataset.target)
    replace_file(trained.run_dir / FIRST_BATCH_FILE, galleries_file([gallery]))


def describe_counts(counts: Counts) -> str:
    """Return a sentence with the numbers of trained parameters."""
    return (
        f"{counts.tuned:,} tuned and {counts.head:,} head parameters train ({counts.percent_of_backbone:.3f} % of "
        f"backbone and head, {counts.percent_of_total:.3f} % of all)"
    )


def check_all_trains(frozen: int, method: str) -> None:
    """Refuse a method that leaves parameters frozen.

    Args:
        frozen: The number of parameters that do not train.
        method: As in the configuration, for the message.

    Raises:
        ConfigError: `frozen` is not 0.
    """
    if frozen:
        raise ConfigError(
            f"pretraining trains everything, but {method} leaves {frozen:,} parameters frozen. Use full, or a method "
            "that also trains the backbone"
        )
