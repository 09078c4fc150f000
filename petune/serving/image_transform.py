"""Preprocess images for a trained model, exactly as its training images were.

Shapes: B batch, C classes, S side of a stored image in pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from petune.base.errors import CheckpointError, DataError
from petune.data import Preprocess, Split
from petune.data.bands import RGB, ImageForm, bands_square, channels_last
from petune.data.folder import CROP
from petune.data.images import center_square, decode_images
from petune.data.video.clips import ONE_VIEW, Views
from petune.data.video.sampling import Sampling
from petune.data.video.store import stored_share, stored_side
from petune.serving.clip_files import ClipFiles

if TYPE_CHECKING:
    from PIL.Image import Image

    LoadedImage = Path | bytes | Image | NDArray[Any] | DataError
    """A file, its bytes, an open image, (height, width) or (height, width, channels), or the error of finding it."""

STORED_SIZES = {"cifar10": 32, "cifar100": 32, "digits": 8}  # for adapters saved before the size was recorded


@dataclass(frozen=True)
class ImageTransform:
    """Steps from an image to the model's input.

    Attributes:
        preprocess: Size and statistics of the model's input.
        stored_size: Side in pixels to which images are resized first. For CIFAR-10 it is 32, whatever the model's
            input, because the model was trained on enlarged small images.
        crop: Share of that side that the model sees.
        form: Channels and type of the images.
        sampling: Which frames of a video make a clip; None if the model takes images.
        views: Clips and crops of a video, whose outputs are averaged.
    """

    preprocess: Preprocess
    stored_size: int
    crop: float
    form: ImageForm = RGB
    sampling: Sampling | None = None
    views: Views = ONE_VIEW

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ImageTransform:
        """Read the steps from an adapter's metadata.

        Raises:
            CheckpointError: They are missing or damaged.
        """
        try:
            values = metadata["preprocess"]
            size = int(values["image_size"])
            sampling = Sampling(**values["clip"]) if "clip" in values else None
            mean, std = (tuple(map(float, values[key])) for key in ("mean", "std"))
            preprocess = Preprocess(size, mean, std, sampling.frames if sampling else None)
            if "stored_size" in values:
                form = ImageForm(int(values.get("channels", 3)), str(values.get("dtype", "uint8")))
                steps = cls(preprocess, int(values["stored_size"]), float(values["crop"]), form, sampling)
                return steps.with_views(Views(**values["views"])) if "views" in values else steps
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the adapter does not say how its images were preprocessed: {error!r}") from None
        dataset = str(metadata.get("dataset"))
        if dataset in STORED_SIZES:
            return cls(preprocess, STORED_SIZES[dataset], 1.0)
        return cls(preprocess, math.ceil(size / CROP), CROP)

    def with_views(self, views: Views) -> ImageTransform:
        """Return the steps for several clips and crops of each video."""
        size = self.preprocess.image_size
        return replace(self, views=views, stored_size=stored_side(size, views), crop=stored_share(views))

    def squares(self, images: Sequence[LoadedImage]) -> tuple[NDArray[Any], dict[int, str]]:
        """Decode images and resize their center squares to `stored_size`.

        Returns:
            The squares, (B, S, S, C) of the type and channels of `form`, and the reason for each position that cannot
            be read (it is black). Of videos, all views of the first one, then those of the next, (B * V, T, S, S, C).
        """
        if self.sampling is not None:
            return ClipFiles(self.sampling, self.stored_size, self.views).read(images)
        out = np.zeros((len(images), self.stored_size, self.stored_size, self.form.channels), self.form.dtype)
        files = {i: image for i, image in enumerate(images) if isinstance(image, Path)}
        positions = list(files)
        decoded = np.empty((len(files), *out.shape[1:]), self.form.dtype)
        broken = decode_images(list(files.values()), decoded, form=self.form)
        out[positions] = decoded
        errors = {positions[i]: reason for i, reason in broken.items()}
        for i, image in enumerate(images):
            if isinstance(image, Path):
                continue
            try:
                out[i] = self._square(image)
            except Exception as error:  # Pillow raises a dozen types, and each means that this image is broken
                errors[i] = " ".join(str(error).split()) or type(error).__name__
        return out, errors

    def batch(self, squares_BSSC: NDArray[Any], device: torch.device) -> Tensor:
        """Turn squares, (B, …, S, S, C), into the model's input, float32 (B, …, C, H, W)."""
        split = Split.of(squares_BSSC, np.zeros(len(squares_BSSC), np.int64), self.crop)
        return self.preprocess.normalize(self.preprocess.pixels(split, np.arange(len(split)), device))

    def _square(self, image: bytes | Image | NDArray[Any] | DataError) -> NDArray[Any]:
        if isinstance(image, DataError):
            raise image
        if self.form == RGB:
            return center_square(_open(image), self.stored_size)
        if not isinstance(image, np.ndarray):
            raise ValueError(f"the adapter takes {self.form}; give an array (height, width, channels), or a file")
        return bands_square(channels_last(image), self.stored_size, self.form)


def _open(image: bytes | Image | NDArray[Any]) -> Image:
    from PIL import Image

    if isinstance(image, bytes):
        return Image.open(io.BytesIO(image))
    if not isinstance(image, np.ndarray):
        return image
    if image.dtype != np.uint8:
        raise ValueError(f"the array is {image.dtype}; give uint8, 0 to 255")
    is_gray = image.ndim == 3 and image.shape[2] == 1
    return Image.fromarray(image[..., 0] if is_gray else image)
