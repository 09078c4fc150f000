"""What a trained model says of images: classes and probabilities; an image that cannot be read harms no other.

Shapes: B batch, C classes, S side of a stored image in pixels.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import CheckpointError, DataError, UsageError
from petune.data import Preprocess, Split
from petune.data.find_images import find_images
from petune.data.folder import CROP
from petune.data.images import center_square, decode_images, supported_suffixes
from petune.serving.restore import restore
from petune.sites.logits import logits_of
from petune.training.config import Precision
from petune.training.precision import choose_attention, choose_device, choose_precision

if TYPE_CHECKING:
    from PIL.Image import Image

    Loaded = Path | Image | NDArray[np.uint8] | DataError
    """A file, an open image, uint8 (height, width) or (height, width, 3), or why there is none."""
    ImageSource = str | Loaded
    """The same, or a folder of files."""


@dataclass(frozen=True)
class Inputs:
    """What becomes of an image before the model sees it: what became of those it was trained on.

    Attributes:
        preprocess: Size and statistics of the model's input.
        stored_size: Side in pixels that images are brought to first: of CIFAR-10 32, whatever the model's input,
            since a model that has seen enlarged small images only is to see nothing else.
        crop: Share of that side that the model sees.
    """

    preprocess: Preprocess
    stored_size: int
    crop: float

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> Inputs:
        """Of an adapter directory's `metadata`.

        Raises:
            CheckpointError: It does not say.
        """
        try:
            said = card["preprocess"]
            size = int(said["image_size"])
            preprocess = Preprocess(size, tuple(map(float, said["mean"])), tuple(map(float, said["std"])))
            if "stored_size" in said:
                return cls(preprocess, int(said["stored_size"]), float(said["crop"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"an adapter must say what its images were brought to, but: {error!r}") from None
        known = {"cifar10": 32, "cifar100": 32, "digits": 8}  # directories from before this was recorded
        side = known.get(str(card.get("dataset")))
        return cls(preprocess, side, 1.0) if side else cls(preprocess, math.ceil(size / CROP), CROP)

    def batch(self, squares_BSS3: NDArray[np.uint8], device: torch.device) -> Tensor:
        """Stored images, uint8 (B, S, S, 3), to the model's input, float32 (B, 3, H, W)."""
        split = Split.of(squares_BSS3, np.zeros(len(squares_BSS3), np.int64), self.crop)
        return self.preprocess.normalize(self.preprocess.pixels(split, np.arange(len(split)), device))

    def squares(self, images: Sequence[Loaded]) -> tuple[NDArray[np.uint8], dict[int, str]]:
        """Images as they would be stored, uint8 (B, S, S, 3), and by position why one cannot be read (then black)."""
        out = np.zeros((len(images), self.stored_size, self.stored_size, 3), np.uint8)
        paths = {i: image for i, image in enumerate(images) if isinstance(image, Path)}
        decoded = np.empty((len(paths), *out.shape[1:]), np.uint8)
        broken = decode_images(list(paths.values()), decoded, skip=True)
        out[list(paths)] = decoded
        problems = {list(paths)[i]: reason for i, reason in broken.items()}
        for i, image in enumerate(images):
            try:
                if not isinstance(image, Path):
                    out[i] = center_square(_opened(image), self.stored_size)
            except Exception as error:  # Pillow raises a dozen types, and each means that this one is bad
                problems[i] = " ".join(str(error).split()) or type(error).__name__
        return out, problems


class Guess(NamedTuple):
    """A class and how probable the model takes it to be, 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image.

    Attributes:
        image: Its path, or its place among those given.
        top: The most probable classes, the best first; empty if it could not be read.
        problem: Why it could not be read, empty if it could.
    """

    image: str
    top: tuple[Guess, ...]
    problem: str = ""


class Predictor:
    """A trained model that names images.

    Attributes:
        model: Backbone and adapter on `device`, in eval mode.
        classes: Names in the order of the logits.
        inputs: What becomes of an image first.
        precision: fp32 or bf16.
        method, card: What was trained, and what the run said of itself.
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
        """Build the backbone of a run again and load its adapter.

        Args:
            path: A run directory, or an adapter directory.
            weights: Where the backbone's weights are now; None takes them from where the run did.
            device: As in a run.
            precision: fp32 by default: in bf16 an image's logits depend a little on the others of its batch.
            trust_remote_code: Call the function that builds the backbone, where it is `package.module:factory`.

        Raises:
            CheckpointError, BackboneMismatch, WeightsUnavailable: See `petune.restore`.
            ConfigError: There is no such device or precision.
        """
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        restored = restore(Path(path), weights, trust_remote_code=trust_remote_code)
        self.card, self.method = restored.card, restored.attachment.name
        self.classes = tuple(map(str, self.card["classes"]))
        self.inputs = Inputs.of(self.card)
        self.model = restored.backbone.model.to(self.device).eval()
        choose_attention(self.model, self.device, self.precision)
        self._alone = threading.Lock()  # an attached model keeps tensors beside its places while it runs

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) on the device to logits, float32 (B, C); one thread at a time."""
        with self._alone, torch.inference_mode(), self.autocast():
            return logits_of(self.model(x_BCHW)).float()

    def autocast(self) -> torch.autocast:
        """The number format of forward passes."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def stream(self, images: Iterable[ImageSource], *, top_k: int = 5, batch_size: int = 64) -> Iterator[Prediction]:
        """Predictions in the order of the images, a batch at a time; of a folder all images below it.

        Raises:
            UsageError: `top_k` or `batch_size` is below 1.
        """
        if top_k < 1 or batch_size < 1:
            raise UsageError(f"top_k and batch_size must be 1 or more, but are {top_k} and {batch_size}")
        rest = _one_by_one(images)
        while batch := list(islice(rest, batch_size)):
            yield from self._batch(batch, min(top_k, len(self.classes)))

    def __call__(self, images: Iterable[ImageSource], *, top_k: int = 5, batch_size: int = 64) -> list[Prediction]:
        """The same as a list."""
        return list(self.stream(images, top_k=top_k, batch_size=batch_size))

    def _batch(self, batch: Sequence[tuple[str, Loaded]], top_k: int) -> Iterator[Prediction]:
        squares, problems = self.inputs.squares([image for _, image in batch])
        good = [i for i in range(len(batch)) if i not in problems]
        tops: dict[int, tuple[Guess, ...]] = {}
        if good:
            probable = self.logits(self.inputs.batch(squares[good], self.device)).softmax(-1).topk(top_k)
            for i, values, places in zip(good, probable.values.tolist(), probable.indices.tolist(), strict=True):
                tops[i] = tuple(Guess(self.classes[c], p) for c, p in zip(places, values, strict=True))
        for i, (name, _) in enumerate(batch):
            yield Prediction(name, tops.get(i, ()), problems.get(i, ""))


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
    """Name images with a trained model: `petune.predict("runs/pets", ["cat.jpg", "holidays/"])`.

    An image that cannot be read gets a `problem`; the others are not harmed.

    Args:
        path: A run directory, or an adapter directory.
        images: Files, folders (all images below), open Pillow images, or uint8 (height, width, 3).
        top_k: How many classes to name; at most all there are.
        batch_size: Images a forward.
        weights, device, precision, trust_remote_code: See `Predictor`.

    Raises:
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
    alone = not isinstance(images, Iterable) or isinstance(images, str | np.ndarray)
    several: Any = [images] if alone else images
    predictor = Predictor(
        path, weights=weights, device=device, precision=precision, trust_remote_code=trust_remote_code
    )
    return predictor(several, top_k=top_k, batch_size=batch_size)


def _one_by_one(images: Iterable[ImageSource]) -> Iterator[tuple[str, Loaded]]:
    """Names and images; a folder becomes the images below it."""
    for number, image in enumerate(images):
        if not isinstance(image, str | Path):
            yield f"image {number}", image
            continue
        place = expand_home(image)
        if not place.is_dir():
            yield str(place), place
            continue
        below = find_images(place, unsupported=True)
        yield from ((str(file), file) for file in below)
        if not below:
            known = ", ".join(sorted(supported_suffixes()))
            yield str(place), DataError(f"{place} must hold images, but has none (read are {known})")


def _opened(image: Image | NDArray[np.uint8] | DataError) -> Image:
    from PIL import Image

    if isinstance(image, DataError):
        raise image
    if not isinstance(image, np.ndarray):
        return image
    if image.dtype != np.uint8:
        raise ValueError(f"an array must hold uint8, 0 to 255, but holds {image.dtype}")
    return Image.fromarray(image)
