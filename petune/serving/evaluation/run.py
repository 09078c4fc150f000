"""Evaluate a run: on its own test or val split, or on other images of the same classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import DataError, UsageError, did_you_mean
from petune.base.files import replace_file
from petune.base.yaml_values import read_yaml
from petune.data import Dataset, Split
from petune.data.batches import eval_batches
from petune.data.layout import ClassFiles, folder_path, list_split
from petune.data.manifest import check_training_images, is_training_dataset
from petune.runner.run import prepare_data
from petune.runner.run_config import RunConfig
from petune.runner.run_dir import CONFIG_FILE
from petune.serving.evaluation.images import Kind, confusion_plot, reliability_plot
from petune.serving.evaluation.measures import Evaluation, gathered, measured
from petune.serving.predict import Predictor
from petune.training.config import Precision

Part = Literal["test", "val"]
Batches = Iterator[tuple[Tensor, Tensor]]
"""Normalised images (B, 3, H, W) on the model's device, and labels (B,)."""


def evaluate(
    path: str | Path,
    *,
    split: Part = "test",
    dataset: str | None = None,
    data_dir: Path | None = None,
    weights: str | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    batch_size: int = 128,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Evaluate a trained model: `petune.evaluate("runs/pets").classes`.

    Args:
        path: A run directory, or an adapter directory.
        split: `val` is the one that chose the run's epoch.
        dataset: `folder:PATH`, its class folders called as the run's classes are (some may be missing): of
            PATH/test and PATH/val the split, of PATH/CLASS/* all images, which is called split `all` in what is
            returned. None is the run's own dataset, and where it is named, or a copy of its folder is, its own split
            is read too: no image that it trained on.
        data_dir: Where CIFAR lies now; None is where it lay for the run.
        weights: Where the backbone's weights are now; None takes them from where the run did.
        device, precision: As in a run.
        batch_size: Images a forward.
        trust_remote_code: Call the function that builds the backbone, where it is `package.module:factory`.

    Raises:
        DataError: The images are missing or broken, or of other classes.
        UsageError: There is no such split.
        PetuneError: See `petune.Predictor`.
    """
    check_arguments(
        "petune.evaluate",
        path=(path, PathText),
        split=(split, str),
        dataset=(dataset, str | None),
        data_dir=(data_dir, PathText | None),
        weights=(weights, str | None),
        device=(device, str),
        precision=(precision, str),
        batch_size=(batch_size, int),
        trust_remote_code=(trust_remote_code, bool),
    )
    if split not in get_args(Part):
        raise UsageError(f"split must be {' or '.join(get_args(Part))}, but is {split!r}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be 1 or more, but is {batch_size}")
    predictor = Predictor(
        path, weights=weights, device=device, precision=precision, trust_remote_code=trust_remote_code
    )
    trained_on = str(predictor.card.get("dataset"))
    own = dataset is None or is_training_dataset(dataset, trained_on, predictor.card.get("images") or {})
    name, read = trained_on if dataset is None else dataset, str(split)
    if dataset is None and name.startswith("folder:") and not folder_path(name).exists():
        raise DataError(
            f"the images of {path} must be there, but it was trained on {name}, which is not, as seen from here; "
            "name the folder where it is now: --dataset folder:PATH"
        )
    if not own and name.startswith("folder:"):
        place = folder_path(name)
        read, files, said = list_split(place, split)
        source, batches = "; ".join(filter(None, (str(place), said))), _of_folder(place, files, predictor, batch_size)
    else:
        if own:
            check_training_images(name, predictor.card.get("images") or {})
        data = prepare_data(_config(expand_home(path), predictor.card, name, own, data_dir, split))
        source, batches = data.source, _of_dataset(data, split, predictor, batch_size)
    logits_NC, labels_N = gathered([(predictor.logits(x), y) for x, y in batches])
    method = str(predictor.method)
    about = {"method": method, "dataset": name, "split": read, "source": source, "precision": predictor.precision}
    return measured(logits_NC, labels_N, predictor.classes, **about)


def write(evaluation: Evaluation, place: Path, kind: Kind = "svg") -> list[Path]:
    """Write `eval.json`, `confusion.svg` and `reliability.svg` (or `.png`) into a directory; return the files.

    Raises:
        CheckpointError: They cannot be written.
    """
    files = {
        "eval.json": (evaluation.model_dump_json(indent=1) + "\n").encode(),
        f"confusion.{kind}": confusion_plot(evaluation, kind),
        f"reliability.{kind}": reliability_plot(evaluation, kind),
    }
    for file, content in files.items():
        replace_file(place / file, content)
    return [place / file for file in files]


def _config(
    path: Path, card: Mapping[str, object], dataset: str, own: bool, data_dir: Path | None, split: Part
) -> RunConfig:
    """What decides the splits: the run's own configuration, or without one what the adapter says."""
    file = path / CONFIG_FILE
    if not file.is_file():
        file = path.parent / CONFIG_FILE
    values = read_yaml(file) if file.is_file() and own else {}
    if not values and own and split == "val":
        raise UsageError(
            f"the val split was cut from train as {CONFIG_FILE} of the run says, but {path} has none beside it; give "
            "the run directory, or --dataset folder:PATH with a val folder"
        )
    said = card["backbone"]
    assert isinstance(said, dict)
    if not values:
        values = {"backbone": said["name"], "image_size": said["image_size"], "backbone_options": said["options"]}
    values = {**values, "dataset": dataset} | ({"data_dir": data_dir} if data_dir else {})
    return RunConfig.build(values, str(file))


def _of_dataset(data: Dataset, part: Part, predictor: Predictor, batch_size: int) -> Batches:
    if data.classes != predictor.classes:
        raise DataError(
            f"the classes of {data.name} must be those that the model was trained on, but they differ: "
            f"{_first_difference(data.classes, predictor.classes)}"
        )
    split: Split = getattr(data, part)
    for batch in eval_batches(split, predictor.inputs.preprocess, batch_size, predictor.device):
        yield batch.x_BCHW, batch.y_B


def _of_folder(place: Path, by_name: ClassFiles, predictor: Predictor, batch_size: int) -> Batches:
    files, labels = _labelled(place, by_name, predictor.classes)
    for start in range(0, len(files), batch_size):
        squares, problems = predictor.inputs.squares(files[start : start + batch_size])
        if problems:
            raise DataError(
                f"{next(iter(problems.values()))}. Mend it or take it away (`petune data check {place}` lists them all)"
            )
        y = torch.from_numpy(labels[start : start + batch_size])
        yield predictor.inputs.batch(squares, predictor.device), y


def _labelled(place: Path, by_name: ClassFiles, classes: Sequence[str]) -> tuple[list[Path], NDArray[np.int64]]:
    strange = [name for name in by_name if name not in classes]
    if strange:
        raise DataError(
            f"the class folders of {place} must be called as the model's classes are, but {strange[0]!r} is none"
            f"{did_you_mean(strange[0], classes)}"
        )
    files = [file for images in by_name.values() for file in images]
    labels = [classes.index(name) for name, images in by_name.items() for _ in images]
    return files, np.array(labels, np.int64)


def _first_difference(here: Sequence[str], there: Sequence[str]) -> str:
    if len(here) != len(there):
        return f"{len(here)} here and {len(there)} there"
    return next(f"{a!r} here and {b!r} there" for a, b in zip(here, there, strict=True) if a != b)
