"""Check an exported program that takes images of any size: its pixels, and its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from petune.base.errors import ExportError
from petune.serving.export.traced import OutputCheck
from petune.serving.image_transform import ImageTransform
from petune.sites.logits import logits_of

MAX_PIXEL_DIFFERENCE = 1.01
"""Of 255 levels: where one order of additions rounds up, another order of additions may round down."""


@dataclass(frozen=True)
class ImageCheck:
    """Images of several sizes, and what the trained model makes of each.

    Attributes:
        transform: The preprocessing.
        pixels: The model's input for each image, float32 (1, C, T, T).
        outputs: The images, (H, W, C), and the expected logits.
    """

    transform: ImageTransform
    pixels: tuple[Tensor, ...]
    outputs: OutputCheck

    @classmethod
    def of(cls, model: nn.Module, transform: ImageTransform) -> ImageCheck:
        """Run the model on fixed random images: smaller and larger than it needs, wide, odd, and much larger."""
        side, form = transform.stored_size, transform.form
        sizes = ((side, side), (2 * side + 1, side + 6), (side // 2 + 1, side // 3 + 2), (7 * side + 3, 6 * side + 1))
        generator = np.random.default_rng(0)
        high = np.iinfo(form.dtype).max + 1 if form.dtype != "float32" else 1
        images = [(generator.random((*size, form.channels)) * high).astype(form.dtype) for size in sizes]
        squares = [transform.squares([image])[0] for image in images]
        pixels = tuple(transform.batch(square, torch.device("cpu")) for square in squares)
        with torch.no_grad():
            expected = tuple(logits_of(model(x)) for x in pixels)
        return cls(transform, pixels, OutputCheck(tuple(map(torch.from_numpy, images)), expected))

    def pixel_difference(self, compute: Callable[[Tensor], Tensor]) -> float:
        """Return the largest difference between pixels, in levels of 255.

        Args:
            compute: The exported preprocessing.

        Raises:
            ExportError: The difference is above `MAX_PIXEL_DIFFERENCE`.
        """
        levels = torch.tensor(self.transform.preprocess.std).view(1, -1, 1, 1) * 255
        pairs = zip(self.outputs.images, self.pixels, strict=True)
        largest = max(float(((compute(image) - x_1CTT) * levels).abs().max()) for image, x_1CTT in pairs)
        if not largest <= MAX_PIXEL_DIFFERENCE:  # NaN as well
            raise ExportError(
                f"the preprocessing of the ONNX file differs from petune's by {largest:.2g} of 255 levels. Nothing was "
                "written. Export without preprocessing",
                cli_hint="Leave out --with-preprocessing",
            )
        return largest
