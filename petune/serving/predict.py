"""Predict the classes of images with a trained model. Unreadable images are reported, the others still predicted.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import DataError, UsageError
from petune.data.find_images import find_images
from petune.data.images import supported_suffixes
from petune.data.registry import build_reader, is_table
from petune.serving.image_transform import ImageTransform
from petune.serving.restore import restore
from petune.sites.logits import logits_of
from petune.training.config import Precision
from petune.training.precision import choose_attention, choose_device, choose_precision

if TYPE_CHECKING:
    from petune.serving.image_transform import LoadedImage

    ImageSource = str | LoadedImage
    """An image, or a folder of images."""


class ClassProbability(NamedTuple):
    """A class and its probability, 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The predicted classes of one image.

    Attributes:
        image: Its path, or its position among the given images.
        top: The most probable classes, the best first; empty if the image cannot be read.
        error: Why the image cannot be read; empty if it can.
    """

    image: str
    top: tuple[ClassProbability, ...]
    error: str = ""


class Predictor:
    """A trained model that classifies images.

    Attributes:
        model: Backbone and adapter on `device`, in eval mode.
        classes: Class names in the order of the logits.
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
        precision: Precision = "fp32",
        trust_remote_code: bool = False,
    ) -> None:
        """Rebuild the backbone of a run and load its adapter.

        Args:
            path: A run directory, or an adapter directory.
            weights: Where the backbone's weights are now; None takes them from where the run did.
            device: As in a run.
            precision: fp32 by default, because in bf16 the logits of an image depend slightly on its batch.
            trust_remote_code: Allow a backbone that is built by the function `package.module:factory`.

        Raises:
            CheckpointError: See `restore`.
            BackboneMismatch: The weights are different ones.
            WeightsUnavailable: The weights are no longer available.
            ConfigError: There is no such device or precision.
        """
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        restored = restore(Path(path), weights, trust_remote_code=trust_remote_code)
        self.metadata = restored.metadata
        self.method = restored.attachment.name
        self.classes = tuple(map(str, self.metadata["classes"]))
        self.transform = ImageTransform.from_metadata(self.metadata)
        self.model = restored.backbone.model.to(self.device).eval()
        choose_attention(self.model, self.device, self.precision)
        self._lock = threading.Lock()  # hooks hold activations during a forward

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Return logits, float32 (B, C), of normalized images (B, 3, H, W) on the device; thread-safe."""
        with self._lock, torch.inference_mode(), self.autocast():
            return logits_of(self.model(x_BCHW)).float()

    def autocast(self) -> torch.autocast:
        """Return the context that sets the precision of a forward."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def stream(self, images: Iterable[ImageSource], *, top_k: int = 5, batch_size: int = 64) -> Iterator[Prediction]:
        """Yield predictions in the order of the images, one batch at a time.

        Args:
            images: Files, folders (searched for images), tables with paths of images, open Pillow images, or uint8
                (height, width, 3).
            top_k: Number of classes per image; at most all there are.
            batch_size: Images per forward.

        Raises:
            UsageError: `top_k` or `batch_size` is below 1.
        """
        if top_k < 1 or batch_size < 1:
            raise UsageError(f"top_k is {top_k} and batch_size is {batch_size}. Both must be at least 1")
        remaining = _list_images(images)
        while batch := list(islice(remaining, batch_size)):
            yield from self._predict_batch(batch, min(top_k, len(self.classes)))

    def __call__(self, images: Iterable[ImageSource], *, top_k: int = 5, batch_size: int = 64) -> list[Prediction]:
        """Return the predictions of `stream` as a list."""
        return list(self.stream(images, top_k=top_k, batch_size=batch_size))

    def _predict_batch(self, batch: Sequence[tuple[str, LoadedImage]], top_k: int) -> Iterator[Prediction]:
        squares, errors = self.transform.squares([image for _, image in batch])
        readable = [i for i in range(len(batch)) if i not in errors]
        tops: dict[int, tuple[ClassProbability, ...]] = {}
        if readable:
            logits_BC = self.logits(self.transform.batch(squares[readable], self.device))
            tops = dict(zip(readable, top_classes(logits_BC, self.classes, top_k), strict=True))
        for i, (name, _) in enumerate(batch):
            yield Prediction(name, tops.get(i, ()), errors.get(i, ""))


def top_classes(logits_BC: Tensor, classes: Sequence[str], top_k: int) -> list[tuple[ClassProbability, ...]]:
    """Return the `top_k` most probable classes of each row, the best first."""
    best = logits_BC.softmax(-1).topk(top_k)
    return [
        tuple(ClassProbability(classes[c], probability) for c, probability in zip(row, values, strict=True))
        for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def predict(
    path: str | Path,
    images: ImageSource | Iterable[ImageSource],
    *,
    top_k: int = 5,
    batch_size: int = 64,
    weights: str | None = None,
    device: str = "auto",
    precision: Precision = "fp32",
    trust_remote_code: bool = False,
) -> list[Prediction]:
    """Predict the classes of images: `petune.predict("runs/pets", ["cat.jpg", "holidays/"])`.

    An image that cannot be read gets an `error`; the others are still predicted.

    Args:
        path: A run directory, or an adapter directory.
        images: One image or several; see `Predictor.stream`.
        top_k: Number of classes per image; at most all there are.
        batch_size: Images per forward.
        weights, device, precision, trust_remote_code: See `Predictor`.

    Raises:
        UsageError: An argument has another type, or is out of range.
        PetuneError: See `Predictor`.
    """
    check_arguments(
        "petune.predict",
        path=(path, PathText),
        top_k=(top_k, int),
        batch_size=(batch_size, int),
        weights=(weights, str | None),
        device=(device, str),
        precision=(precision, str),
        trust_remote_code=(trust_remote_code, bool),
    )
    is_single = not isinstance(images, Iterable) or isinstance(images, str | np.ndarray)
    sources: Any = [images] if is_single else images
    predictor = Predictor(
        path, weights=weights, device=device, precision=precision, trust_remote_code=trust_remote_code
    )
    return predictor(sources, top_k=top_k, batch_size=batch_size)


def _list_images(sources: Iterable[ImageSource]) -> Iterator[tuple[str, LoadedImage]]:
    """Yield names and images; a folder or a table is replaced by the images in it."""
    for number, source in enumerate(sources):
        if not isinstance(source, str | Path):
            yield f"image {number}", source
            continue
        path = expand_home(source)
        if is_table(str(source)):
            yield from ((str(file), file) for file in _files_of_table(str(source)))
            continue
        if not path.is_dir():
            yield str(path), path
            continue
        files = find_images(path, unsupported=True)
        yield from ((str(file), file) for file in files)
        if not files:
            supported = ", ".join(sorted(supported_suffixes()))
            yield str(path), DataError(f"no images in {path} (supported: {supported})")


def _files_of_table(text: str) -> list[Path]:
    files = build_reader(text).image_files()
    if files is None:
        raise DataError(f"the images of {text} are not files, and so cannot be named. Evaluate on it instead")
    return files
