"""Select the images of an evaluation: a split of the run's dataset, or a folder with the same classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from petune.base.errors import DataError, PluginError, UnknownName, UsageError, did_you_mean
from petune.base.text import plural
from petune.data import Dataset, Split, Target
from petune.data.band_files import form_of
from petune.data.batches import eval_batches, num_views
from petune.data.dataset import FRAMES
from petune.data.lookup import check_training_images, is_training_dataset
from petune.data.reader import LabeledFiles
from petune.data.registry import build_reader
from petune.data.video.clips import Clips
from petune.data.video.options import ClipOptions
from petune.runner.file_names import CONFIG_FILE, SPLITS_FILE
from petune.runner.kept_splits import SplitRecord, file_digests, read_splits
from petune.runner.migrations import read_config
from petune.runner.run_adapter import find_adapter, run_dir_of
from petune.runner.run_config import RunConfig
from petune.runner.run_data import prepare_data
from petune.runner.split_options import SPLIT_KEYS, TEST_KEYS, read_split_options
from petune.serving.image_transform import ImageTransform
from petune.serving.predict import Predictor

MAX_NAMES = 5
EvalSplit = Literal["test", "val"]
Load = Callable[[NDArray[np.int64]], tuple[Tensor, Tensor]]
"""Positions to normalized images (B, C, H, W), or views of clips (B * V, T, C, H, W), and targets (B, …)."""


@dataclass(frozen=True)
class EvalRequest:
    """Images to evaluate on; see `petune.evaluate`.

    Attributes:
        path: The run or adapter directory.
        split, dataset, data_dir, batch_size: Arguments of `petune.evaluate`.
    """

    path: Path
    split: EvalSplit
    dataset: str | None
    data_dir: Path | None
    batch_size: int


@dataclass(frozen=True)
class EvalImages:
    """Images to evaluate on.

    Attributes:
        dataset, split, source: Where they come from; see `Evaluation`.
        names: The file or key of each image, or its position in the split.
        load: Loads images by position.
        num_trained_on: How many the model was trained on; None if that is not known.
        views: Clips and crops of each video; `load` returns all of them for each target.
    """

    dataset: str
    split: str
    source: str
    names: Sequence[str]
    load: Load
    num_trained_on: int | None = None
    views: int = 1

    def batches(self, batch_size: int) -> Iterator[tuple[Sequence[str], Tensor, Tensor]]:
        """Yield names, images and targets of all images, in order."""
        batch_size = max(1, batch_size // self.views)
        for start in range(0, len(self.names), batch_size):
            names = self.names[start : start + batch_size]
            yield names, *self.load(np.arange(start, start + len(names)))


def select_images(predictor: Predictor, request: EvalRequest) -> EvalImages:
    """Select the images to evaluate on.

    Raises:
        DataError: The images are missing, or of other classes.
        UsageError: The folder has no such split, or the run's splits are not known.
    """
    trained_on = str(predictor.metadata.get("dataset"))
    trained_digests = predictor.metadata.get("images") or {}
    if request.dataset is None:
        _check_exists(request.path, trained_on)
    dataset = trained_on if request.dataset is None else request.dataset
    is_own = request.dataset is None or is_training_dataset(dataset, trained_on, trained_digests)
    run_dir = run_dir_of(find_adapter(request.path), predictor.metadata)
    labeled = None if is_own else build_reader(dataset).labeled_files(request.split)
    if labeled is not None:
        images = _file_images(dataset, labeled, predictor)
        return replace(images, num_trained_on=_num_trained_on(labeled, read_splits(run_dir)))
    if is_own:
        check_training_images(dataset, trained_digests, request.data_dir)
    if is_own and predictor.metadata.get("kept_splits") and read_splits(run_dir) is None:
        raise UsageError(
            f"{request.path} has the splits of an earlier run, which are in the {SPLITS_FILE} of its run directory. "
            "Give the run directory, or other images: dataset='folder:PATH'",
            cli_hint="Name other images with --dataset folder:PATH",
        )
    options = read_split_options(predictor.metadata, run_dir) if is_own else None
    if is_own:
        _check_known(options, request)
    data = prepare_data(
        _run_config(predictor.metadata, dataset, options or {}, request, run_dir if is_own else None), run_dir
    )
    images = _split_images(dataset, data, predictor, request.split)
    if options is None or not {*TEST_KEYS} <= options.keys():
        return images
    has_val = "final_fit" in predictor.metadata.get("training", {})
    return replace(images, num_trained_on=len(images.names) if has_val and request.split == "val" else 0)


def _check_known(options: Mapping[str, Any] | None, request: EvalRequest) -> None:
    """Check that there is a split of the own dataset that no averaged run trained on in another fold.

    Raises:
        UsageError: There is none, or it is not known which images val has.
    """
    if options is not None and not {"folds", "fold"} <= options.keys():
        raise UsageError(
            f"the runs that {request.path} averages had other folds, so each trained on test images of another. Give "
            "images that none of them saw: dataset='folder:PATH'",
            cli_hint="Name them with --dataset folder:PATH",
        )
    if request.split == "val" and (options is None or not {*SPLIT_KEYS} <= options.keys()):
        raise UsageError(
            f"the val split of {request.path} is unknown, because there is no {CONFIG_FILE} next to the adapter. Give "
            "the run directory, or a dataset with a val folder. An average has the val split that its runs share"
        )


def _num_trained_on(labeled: LabeledFiles, record: SplitRecord | None) -> int | None:
    """Return how many files have the bytes of a training image; None if the run or one before did not record them."""
    files = [str(file) for file in labeled.files if isinstance(file, str | Path)]
    if record is None or not record.by_files or len(files) < len(labeled.files):
        return None
    seen = sum(digest in record.trained_on for digest in file_digests(files))
    return None if record.trained_before is None and not seen else seen


def _check_exists(path: Path, trained_on: str) -> None:
    try:
        source = build_reader(trained_on).path
    except UnknownName as error:
        raise PluginError(
            f"{path} was trained on the dataset {error.name!r}, which no installed package has. Install its package "
            f"first, such as pip install petune-{error.name}, or evaluate on another dataset",
            cli_hint="The flag is --dataset",
        ) from None
    if source is not None and not source.exists():
        raise DataError(
            f"{path} was trained on {trained_on}, which does not exist here. Give its new location: "
            "dataset='folder:PATH'",
            cli_hint="Use --dataset folder:PATH",
        )


def _run_config(
    metadata: Mapping[str, Any], dataset: str, options: Mapping[str, Any], request: EvalRequest, run_dir: Path | None
) -> RunConfig:
    """Return the config that defines the splits: the run's own, or without one what the adapter records."""
    if run_dir is not None:
        values = read_config(run_dir / CONFIG_FILE)
    else:
        backbone = metadata["backbone"]
        values = {
            "backbone": backbone["name"],
            "backbone_options": backbone["options"],
            "image_size": backbone["image_size"],
            **options,
        }
    values = {**values, "dataset": dataset} | ({"data_dir": request.data_dir} if request.data_dir else {})
    return RunConfig.build(values, str((run_dir or request.path) / CONFIG_FILE))


def _split_images(name: str, data: Dataset, predictor: Predictor, part: EvalSplit) -> EvalImages:
    _check_target(data.name, data.target, predictor.task.target)
    split: Split = getattr(data, part)
    _check_clips(data.name, split.num_frames, predictor.transform)
    if isinstance(split.images, Clips) and split.images.sampling != predictor.transform.sampling:
        raise DataError(
            f"{name} makes clips by {split.images.sampling}, but the model was trained by "
            f"{predictor.transform.sampling}. Use the same options of the dataset"
        )
    views = num_views(split)

    def load(positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        few = split.take(positions)
        (batch,) = eval_batches(few, predictor.transform.preprocess, len(few) * views, predictor.device)
        return batch.x_BCHW, batch.y_B

    names = [f"{part} {i}" for i in range(len(split))] if split.names is None else split.names.tolist()
    return EvalImages(name, part, data.source, names, load, views=views)


def _check_clips(name: str, num_frames: int | None, transform: ImageTransform) -> None:
    """Check that the dataset has clips as the model was trained on, or images if it was trained on images."""
    trained = transform.preprocess.frames
    if num_frames == trained:
        return
    has, takes = (
        "images" if frames is None else f"clips of {plural(frames, 'frame')}" for frames in (num_frames, trained)
    )
    advice = f". Add ,frames={trained} to the dataset" if trained and num_frames else ""
    raise DataError(f"{name} has {has}, but the model was trained on {takes}{advice}")


def _transform_of(dataset: str, transform: ImageTransform) -> ImageTransform:
    """Return the steps for the files of a dataset, with the clips and crops that it asks for, or else the run's.

    Raises:
        DataError: The dataset asks for other clips than those of the training, or has images instead.
    """
    options = build_reader(dataset).config
    if not isinstance(options, ClipOptions):
        _check_clips(dataset, None, transform)
        return transform
    if transform.sampling is None:
        has_videos = build_reader(dataset).name == "video"
        _check_clips(dataset, FRAMES if has_videos else None, transform)
        return transform
    trained = transform.sampling
    for key in ("frames", "sampling", "stride"):
        value = getattr(options, key)
        own = trained.kind if key == "sampling" else getattr(trained, key)
        if key in options.model_fields_set and value != own:
            raise DataError(f"{dataset} asks for {key}={value}, but the model was trained with {own}. Leave {key} out")
    asked = {"test_clips", "test_crops"} & options.model_fields_set
    return transform.with_views(options.views) if asked else transform


def _check_target(name: str, target: Target, trained: Target) -> None:
    if target.kind != trained.kind:
        raise DataError(f"the targets of {name} are of kind {target.kind!r}; the model was trained on {trained.kind!r}")
    if target.kind == "mask" and target.names == trained.names[: len(target.names)]:
        return  # masks without the last classes
    if target.names != trained.names:
        advice = f". Name them: classes=[{','.join(trained.names)}]" if target.kind == "mask" else ""
        noun = "numbers" if target.kind == "number" else "classes"
        raise DataError(
            f"{name} has other {noun} than the model was trained on: {_first_difference(target.names, trained.names)}"
            f"{advice}"
        )


def _file_images(dataset: str, labeled: LabeledFiles, predictor: Predictor) -> EvalImages:
    path = str(build_reader(dataset).path or dataset)
    targets = _targets_of_model(path, labeled, predictor.task.target)
    transform = _transform_of(dataset, predictor.transform)

    def _named(positions: NDArray[np.int64], errors: Mapping[int, str]) -> str:
        number, reason = next(iter(errors.items()))
        name = str(labeled.files[positions[number]]) if labeled.names is None else labeled.names[positions[number]]
        return reason if reason.startswith(name) else f"{name}: {reason}"

    def load(positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        squares, errors = transform.squares([labeled.files[i] for i in positions])
        if errors:
            file = labeled.files[positions[next(iter(errors))]]
            is_image = not isinstance(file, np.ndarray) and transform.sampling is None
            form, own = transform.form, form_of(file) if is_image else None
            if isinstance(file, np.ndarray) or own not in (None, form):
                raise DataError(f"{_named(positions, errors)}. The model was trained on images of {form}")
            raise DataError(
                f"{_named(positions, errors)}. Repair or remove it",
                cli_hint=f"`petune data check {path}` lists all broken images",
            )
        return transform.batch(squares, predictor.device), torch.from_numpy(targets[positions])

    names = [str(file) for file in labeled.files] if labeled.names is None else labeled.names
    source = "; ".join(filter(None, (path, labeled.note)))
    return EvalImages(dataset, labeled.split, source, names, load, views=len(transform.views))


def _targets_of_model(path: str, labeled: LabeledFiles, trained: Target) -> NDArray[Any]:
    """Return the targets of files by the model's numbers of the classes; classes may be missing."""
    known = trained.names
    if labeled.target.kind == trained.kind == "multi_hot" and {*labeled.target.names} <= {*known}:
        targets = np.zeros((len(labeled.targets), len(known)), np.uint8)
        targets[:, [known.index(name) for name in labeled.target.names]] = labeled.targets
        return targets
    if labeled.target.kind != "class" or trained.kind != "class":
        _check_target(path, labeled.target, trained)
        return labeled.targets
    unknown = [name for name in labeled.target.names if name not in known]
    if unknown:
        raise DataError(f"the model has no class {unknown[0]!r}, a class of {path}{did_you_mean(unknown[0], known)}")
    numbers = np.array([known.index(name) for name in labeled.target.names], np.int64)
    return np.asarray(numbers[labeled.targets], np.int64)


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{len(names)} ({', '.join(names[:MAX_NAMES])}{more})"


def _first_difference(data: Sequence[str], model: Sequence[str]) -> str:
    if len(data) != len(model):
        return f"{_shown(data)} instead of {_shown(model)}"
    return next(f"{ours!r} instead of {theirs!r}" for ours, theirs in zip(data, model, strict=True) if ours != theirs)
