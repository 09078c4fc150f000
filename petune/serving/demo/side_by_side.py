"""Predict one image with several adapters on one backbone, whatever the task of each."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from petune.adapters.card import known_metadata
from petune.adapters.format import SavedAdapter
from petune.base.config import expand_home
from petune.base.errors import BackboneMismatch, DataError, UsageError
from petune.runner.report.tiles import with_mask
from petune.runner.run_adapter import read_run_adapter
from petune.serving.adapter_bank import AdapterBank
from petune.serving.image_transform import ImageTransform
from petune.serving.predictions import Prediction, mask_prediction, predictions_of
from petune.serving.restore import rebuild_backbone, task_of
from petune.serving.whole_image import visible
from petune.sites.logits import logits_of
from petune.training.precision import choose_device

SHOWN_SIDE = 320  # pixels of the image on the page


@dataclass(frozen=True)
class Answer:
    """The prediction of one adapter, and the time from decoded pixels to it.

    The overlay of a mask is what the model saw, colored by it: uint8 (side, side, 3).
    """

    name: str
    prediction: Prediction
    time_s: float
    overlay: NDArray[np.uint8] | None = None


class SideBySide:
    """Several adapters on one backbone.

    Attributes:
        names: Names of the adapters, in the given order.
        backbone: Full name of the backbone.
        notes: A description of each adapter: its method, and its main metric on test.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        weights: str | None = None,
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        """Build the backbone once, and load every adapter.

        Args:
            paths: Run directories, or adapter directories.
            weights: Where the backbone's weights are now; None takes them from where the first run did.
            device: As in a run.
            trust_remote_code: Allow a backbone that is built by the function `package.module:factory`.

        Raises:
            UsageError: There is no path, or one is given twice.
            BackboneMismatch: The adapters belong to different backbones.
            PetuneError: See `petune.Predictor`.
        """
        if not paths:
            raise UsageError("give the directory of at least one run or adapter")
        adapters = {name: read_run_adapter(Path(path)) for name, path in zip(_names(paths), paths, strict=True)}
        self.names = list(adapters)
        first = adapters[self.names[0]]
        backbone = rebuild_backbone(first, weights, trust_remote_code=trust_remote_code)
        self.backbone = backbone.full_name
        self.notes = {name: _note(adapter) for name, adapter in adapters.items()}
        self._device = choose_device(device)
        self._bank = AdapterBank(backbone.model.to(self._device))
        self._transforms: dict[str, ImageTransform] = {}
        self._tasks = {name: task_of(adapter) for name, adapter in adapters.items()}
        for name, adapter in adapters.items():
            self._transforms[name] = ImageTransform.from_metadata(adapter.config["metadata"])
            if self._transforms[name].sampling is not None:
                raise UsageError(f"{name} takes videos, and the demo shows images. Use petune.predict")
            try:
                _check_same_backbone(first, adapter)
                self._bank.load(name, adapter.path)
            except BackboneMismatch as error:
                raise BackboneMismatch(
                    f"{name} does not fit the backbone of {self.names[0]}, and a demo has only one: {error}"
                ) from None
            self._warm_up(name)
        self._lock = threading.Lock()

    def __call__(self, image: Path, top_k: int = 5) -> tuple[NDArray[np.uint8], list[Answer]]:
        """Return the center square of an image, uint8 (side, side, 3), and the answer of each adapter.

        Raises:
            DataError: The image cannot be read; the message names it without its folder.
        """
        first = self._transforms[self.names[0]]
        shown = ImageTransform(first.preprocess, SHOWN_SIDE, 1.0, first.form)
        squares = {name: _square(self._transforms[name], image) for name in self.names}
        with self._lock:
            answers = [self._answer(name, squares[name], top_k) for name in self.names]
        return visible(_square(shown, image)[0]), answers

    def has_mask(self, name: str) -> bool:
        """Return True if an adapter predicts a mask."""
        return self._tasks[name].target_kind == "mask"

    def _warm_up(self, name: str) -> None:
        """Run one forward, because the first one is slow and would be shown as the time of an image."""
        side, form = self._transforms[name].stored_size, self._transforms[name].form
        self._answer(name, np.zeros((1, side, side, form.channels), form.dtype), 1)

    def _answer(self, name: str, square_1SSC: NDArray[Any], top_k: int) -> Answer:
        model, task = self._bank.use(name), self._tasks[name]
        start = time.perf_counter()
        with torch.inference_mode():
            x_BCHW = self._transforms[name].batch(square_1SSC, self._device)
            outputs = logits_of(model(x_BCHW)).float()
            if task.target_kind == "mask":
                prediction = mask_prediction(task, name, outputs[0].cpu(), (outputs.shape[2], outputs.shape[3]))
            else:
                (prediction,) = predictions_of(task, [name], outputs, top_k)  # waits for a GPU
        time_s = time.perf_counter() - start
        return Answer(name, prediction, time_s, _overlay(self._transforms[name], square_1SSC, prediction))


def _overlay(transform: ImageTransform, square_1SSC: NDArray[Any], prediction: Prediction) -> NDArray[np.uint8] | None:
    """Return what the model saw, colored by the predicted mask; None if there is no mask."""
    if prediction.mask is None:
        return None
    from PIL import Image

    pixels = visible(square_1SSC[0])
    seen = math.floor(transform.stored_size * transform.crop)
    start = (transform.stored_size - seen) // 2
    image = Image.fromarray(np.ascontiguousarray(pixels[start : start + seen, start : start + seen]))
    shown = np.asarray(image.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BICUBIC))
    return with_mask(shown, prediction.mask, ignore_index=-1)


def _square(transform: ImageTransform, image: Path) -> NDArray[Any]:
    square_1SSC, errors = transform.squares([image])
    if errors:
        raise DataError(errors[0].replace(str(image), image.name))
    return square_1SSC


def _check_same_backbone(first: SavedAdapter, other: SavedAdapter) -> None:
    """Compare how the backbones were built; tensors do not show everything, such as the number of heads."""
    ours, theirs = (adapter.config["metadata"]["backbone"] for adapter in (first, other))
    for key in ("name", "full_name", "options", "image_size", "patch_size", "head"):
        if ours.get(key) != theirs.get(key):
            raise BackboneMismatch(f"{key} is {theirs.get(key)} instead of {ours.get(key)}")


def _names(paths: Sequence[str | Path]) -> list[str]:
    """Return the shortest endings of the paths that differ, without a final `adapter`."""
    parts = [[part for part in expand_home(path).resolve().parts if part != "adapter"] for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"an adapter is given twice: {', '.join(map(str, paths))}")


def _note(adapter: SavedAdapter) -> str:
    metadata = adapter.config["metadata"]
    known = known_metadata(metadata)
    test = ""
    if known["test"]:
        main = known["metric_info"][0]
        test = f", {main.text(known['test']['metrics'][main.name])} {main.label} on test"
    return f"{metadata.get('method') or adapter.config['tuner']} for {metadata.get('dataset', 'a task')}{test}"
