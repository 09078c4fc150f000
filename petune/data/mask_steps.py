"""The variant of a transform of torchvision that does to a mask what its image needs, and torchvision does not."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2


class Erasing(v2.RandomErasing):  # type: ignore[misc]
    """Erase a rectangle. A mask gets `ignore_index` there, where torchvision leaves the class of what is erased."""

    def __init__(self, ignore_index: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.ignore_index = ignore_index

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Erase a part of an image, or of the mask of the image before it."""
        if not isinstance(inpt, tv_tensors.Mask) or params["v"] is None:
            return super().transform(inpt, params)
        mask = inpt.as_subclass(Tensor).clone()
        top, left = params["i"], params["j"]
        mask[..., top : top + params["h"], left : left + params["w"]] = self.ignore_index
        return tv_tensors.Mask(mask)
