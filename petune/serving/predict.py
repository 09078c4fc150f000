"""Predict images with a trained model. Unreadable images are reported, the others still predicted.

Shapes: B batch, C classes or channels.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import DataError, UsageError
from petune.data.find_images import IMAGES, VIDEOS, FileKind, find_images, skipped_note
from petune.data.registry import build_reader, is_table
from petune.serving.image_transform import ImageTransform
from petune.serving.predictions import Prediction, mask_prediction, predictions_of
from petune.serving.restore import restore
from petune.serving.whole_image import WholeImage, whole_outputs
from petune.sites.logits import logits_of
from petune.training.config import Precision
from petune.training.evaluate import mean_of_views
from petune.training.precision import (
    choose_attention,
    choose_device,
    choose_precision,
    precision_of_run,
    set_float32_products,
)

if TYPE_CHECKING:
    from petune.serving.image_transform import LoadedImage

    ImageSource = str | LoadedImage
    """An image, or a folder of images."""


TOP_K = 5
"""Classes that are returned for an image unless the caller says otherwise."""


class Predictor:
    """A trained model that predicts images.

    Attributes:
        model: Backbone and adapter on `device`, in eval mode.
        attachment: The adapter.
        sites: Its blocks.
        task: What it was trained for.
        classes: Names of the task's classes; empty for numbers.
        transform: Preprocessing of the images.
        precision: fp32 or bf16.
        method, metadata: What was trained, and what the run recorded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        weights: str | None = None,
        device: str = "auto",
        precision: Precision | None = "fp32",
        trust_remote_code: bool = False,
    ) -> None:
        """Rebuild the backbone of a run and load its adapter.

        Args:
            path: A run directory, or an adapter directory.
            weights: Where the backbone's weights are now; None takes them from where the run did.
            device: As in a run.
            precision: fp32 by default, because in bf16 the logits of an image depend slightly on its batch. None is
                that of the run, or fp32 where this device has no instructions for it.
            trust_remote_code: Allow a backbone that is built by the function `package.module:factory`.

        Raises:
            CheckpointError: See `restore`.
            PluginError: The adapter's method or its task is not installed.
            BackboneMismatch: The weights are different ones.
            WeightsUnavailable: The weights are no longer available.
            ConfigError: There is no such device or precision.
        """
        self.device = choose_device(device)
        if precision is not None:
            choose_precision(precision, self.device)  # an unknown one is an error before the model is built
        restored = restore(Path(path), weights, trust_remote_code=trust_remote_code)
        self.metadata = restored.metadata
        if precision is None:
            self.precision = precision_of_run(self.run_precision, self.device)
        else:
            self.precision = choose_precision(precision, self.device)
        set_float32_products(self.precision, self.device)
        self.method = restored.attachment.name
        self.attachment = restored.attachment
        self.sites = restored.attachment.sites
        self.task = restored.task
        self.classes = self.task.target.classes
        self.transform = ImageTransform.from_metadata(self.metadata)
        self.model = restored.backbone.model.to(self.device).eval()
        choose_attention(self.model, self.device, self.precision)
        self._lock = threading.Lock()  # hooks hold activations during a forward

    @property
    def run_precision(self) -> str | None:
        """Number format that the run was trained and tested in; None if it recorded none."""
        return (self.metadata.get("training") or {}).get("precision")

    def outputs(self, x_BCHW: Tensor) -> Tensor:
        """Return the head's outputs, float32 (B, …), for normalized images (B, C, H, W) on the device; thread-safe."""
        with self._lock, torch.inference_mode(), self.autocast():
            return logits_of(self.model(x_BCHW)).float()

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits of a classifier, float32 (B, C); see `outputs`."""
        return self.outputs(x_BCHW)

    @property
    def file_kind(self) -> FileKind:
        """Images, or videos for a model of clips."""
        return IMAGES if self.transform.sampling is None else VIDEOS

    def autocast(self) -> torch.autocast:
        """Return the context that sets the precision of a forward."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def stream(
        self, images: ImageSource | Iterable[ImageSource], *, top_k: int | None = None, batch_size: int = 64
    ) -> Iterator[Prediction]:
        """Yield predictions in the order of the images, one batch at a time.

        Args:
            images: One image or several: files, their bytes, folders (searched for images), tables with paths of
                images, open Pillow images, or uint8 (height, width, 3). A model of clips takes files of
                videos, folders of them, or uint8 (frames, height, width, 3).
            top_k: Number of classes per image; at most all there are. None gives 5. Labels and numbers are always all
                returned.
            batch_size: Images per forward.

        Raises:
            UsageError: `top_k` or `batch_size` is below 1, the task has no classes to choose `top_k` of, or an image is
                a tensor.
            PluginError: The task of a plugin fails.
        """
        if (top_k is not None and top_k < 1) or batch_size < 1:
            raise UsageError(f"top_k is {top_k} and batch_size is {batch_size}. Both must be at least 1")
        if top_k is not None and self.task.target_kind != "class":
            raise UsageError(
                f"top_k chooses the most probable classes, and the task {self.task.name} predicts no single class. "
                "Leave it out",
                cli_hint="Drop --top-k",
            )
        batch_size = max(1, batch_size // len(self.transform.views))
        remaining = _list_images(_as_sources(images), self.file_kind)
        while batch := list(islice(remaining, batch_size)):
            if self.task.target_kind == "mask":
                yield from self._predict_masks(batch, batch_size)
            else:
                yield from self._predict_batch(batch, top_k or TOP_K)

    def skipped_in(self, folders: Iterable[Path]) -> str:
        """Name the files in folders that are not predicted, other than annotations; empty if there are none."""
        skipped = Counter[str]()
        for folder in map(expand_home, folders):
            if folder.is_dir() and not is_table(str(folder)):
                find_images(folder, skipped, unsupported=self.file_kind == IMAGES, kind=self.file_kind)
        return skipped_note(skipped, self.file_kind)

    def __call__(
        self, images: ImageSource | Iterable[ImageSource], *, top_k: int | None = None, batch_size: int = 64
    ) -> list[Prediction]:
        """Return the predictions of `stream` as a list."""
        return list(self.stream(images, top_k=top_k, batch_size=batch_size))

    def _predict_masks(self, batch: Sequence[tuple[str, LoadedImage]], batch_size: int) -> Iterator[Prediction]:
        seen = replace(self.transform, crop=1.0)
        for name, loaded in batch:
            try:
                image = WholeImage.read(loaded, self.transform)
            except Exception as error:  # Pillow raises a dozen types, and each means that this image is broken
                yield Prediction(name, error=" ".join(str(error).split()) or type(error).__name__)
                continue
            outputs_Chw = whole_outputs(image, lambda x: self.outputs(seen.batch(x, self.device)), batch_size)
            yield mask_prediction(self.task, name, outputs_Chw, image.size)

    def _predict_batch(self, batch: Sequence[tuple[str, LoadedImage]], top_k: int) -> Iterator[Prediction]:
        squares, errors = self.transform.squares([image for _, image in batch])
        readable = [i for i in range(len(batch)) if i not in errors]
        predictions: dict[int, Prediction] = {}
        if readable:
            views = len(self.transform.views)
            seen = squares.reshape(len(batch), views, *squares.shape[1:])[readable]
            inputs = self.transform.batch(seen.reshape(-1, *squares.shape[1:]), self.device)
            outputs = mean_of_views(self.outputs(inputs), views)
            names = [batch[i][0] for i in readable]
            predictions = dict(zip(readable, predictions_of(self.task, names, outputs, top_k), strict=True))
        for i, (name, _) in enumerate(batch):
            yield predictions[i] if i in predictions else Prediction(name, error=errors[i])


def predict(
    path: str | Path,
    images: ImageSource | Iterable[ImageSource],
    *,
    top_k: int | None = None,
    batch_size: int = 64,
    weights: str | None = None,
    device: str = "auto",
    precision: Precision = "fp32",
    trust_remote_code: bool = False,
) -> list[Prediction]:
    """Predict images: `petune.predict("runs/pets", ["cat.jpg", "holidays/"])`.

    The task of the run says what is predicted: classes, labels, numbers, or masks of whole images. An image that cannot
    be read gets an `error`; the others are still predicted.

    Args:
        path: A run directory, or an adapter directory.
        images: One image or several; see `Predictor.stream`.
        top_k: Number of classes per image; at most all there are. None gives 5. For tasks with one class per image.
        batch_size: Images per forward.
        weights, device, precision, trust_remote_code: See `Predictor`.

    Raises:
        UsageError: An argument has another type, or is out of range.
        PetuneError: See `Predictor`.
    """
    check_arguments(
        "petune.predict",
        path=(path, PathText),
        top_k=(top_k, int | None),
        batch_size=(batch_size, int),
        weights=(weights, str | None),
        device=(device, str),
        precision=(precision, str),
        trust_remote_code=(trust_remote_code, bool),
    )
    predictor = Predictor(
        path, weights=weights, device=device, precision=precision, trust_remote_code=trust_remote_code
    )
    return predictor(images, top_k=top_k, batch_size=batch_size)


def _as_sources(images: ImageSource | Iterable[ImageSource]) -> Iterable[ImageSource]:
    """Return images as an iterable: a path, bytes and an array are one image."""
    _refuse_tensor(images)
    is_single = isinstance(images, str | bytes | np.ndarray) or not isinstance(images, Iterable)
    sources: Any = [images] if is_single else images
    listed: Iterable[ImageSource] = sources
    return listed


def _refuse_tensor(source: object) -> None:
    if isinstance(source, Tensor):
        raise UsageError(
            "an image is given as a tensor. Give a file, its bytes, a Pillow image, or an array uint8 (height, width, "
            "3); for normalized images (B, C, H, W) call Predictor.outputs"
        )


def _list_images(sources: Iterable[ImageSource], kind: FileKind) -> Iterator[tuple[str, LoadedImage]]:
    """Yield names and images; a folder or a table is replaced by the images in it."""
    for number, source in enumerate(sources):
        _refuse_tensor(source)
        if not isinstance(source, str | Path):
            yield f"{kind.noun} {number}", source
            continue
        path = expand_home(source)
        if is_table(str(source)):
            yield from ((str(file), file) for file in _files_of_table(str(source)))
            continue
        if not path.is_dir():
            yield str(path), path
            continue
        files = find_images(path, unsupported=kind == IMAGES, kind=kind)
        yield from ((str(file), file) for file in files)
        if not files:
            supported = ", ".join(sorted(kind.suffixes()))
            yield str(path), DataError(f"no {kind.noun}s in {path} (supported: {supported})")


def _files_of_table(text: str) -> list[Path]:
    files = build_reader(text).image_files()
    if files is None:
        raise DataError(f"the images of {text} are not files, and so cannot be named. Evaluate on it instead")
    return files
