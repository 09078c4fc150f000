"""Several adapters on one backbone, asked about the same image."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from petune.adapters.format import SavedAdapter
from petune.base.config import expand_home
from petune.base.errors import BackboneMismatch, DataError, UsageError
from petune.serving.adapter_bank import AdapterBank
from petune.serving.image_transform import ImageTransform
from petune.serving.predict import ClassProbability
from petune.serving.restore import read_run_adapter, rebuild_backbone
from petune.sites.logits import logits_of
from petune.training.precision import choose_device

SHOWN_SIDE = 320  # pixels of the image on the page


@dataclass(frozen=True)
class Answer:
    """What one adapter says: its classes, the best first, and the time from decoded pixels to logits."""

    name: str
    top: tuple[ClassProbability, ...]
    time_s: float


class SideBySide:
    """Adapters by name on one backbone.

    Attributes:
        names: One an adapter, in the order given.
        backbone: The backbone's full name.
        notes: By name, what the page says of an adapter: its method, and how good it was on test.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        weights: str | None = None,
        device: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        """Build the backbone once, and load every adapter on it.

        Args:
            paths: Run directories, or adapter directories.
            weights: Where the backbone's weights are now; None takes them from where the first run did.
            device: As in a run.
            trust_remote_code: Call the function that builds the backbone, where it is `package.module:factory`.

        Raises:
            UsageError: No path, or adapters of backbones that were built in other ways.
            BackboneMismatch: An adapter belongs to another backbone.
            CheckpointError, WeightsUnavailable, PluginError: See `petune.restore`.
        """
        if not paths:
            raise UsageError("a demo needs the directory of at least one run or adapter")
        saved = {name: read_run_adapter(Path(path)) for name, path in zip(_names(paths), paths, strict=True)}
        first_name, first = next(iter(saved.items()))
        self.names = list(saved)
        self.device = choose_device(device)
        built = rebuild_backbone(first, weights, trust_remote_code=trust_remote_code)
        self.backbone = built.full_name
        self.tasks = AdapterBank(built.model.to(self.device))
        for name, one in saved.items():
            _same_backbone(first_name, first, name, one)
            try:
                self.tasks.load(name, one.path)
            except BackboneMismatch:  # of the same shape, with other weights
                raise _unlike(first_name, first, name, one) from None
        self._inputs = {name: ImageTransform.from_metadata(one.config["metadata"]) for name, one in saved.items()}
        self._classes = {name: [str(c) for c in one.config["metadata"]["classes"]] for name, one in saved.items()}
        self.notes = {name: _note(one) for name, one in saved.items()}
        self._one_at_a_time = threading.Lock()
        for name in self.names:  # the first forward is slow, and would be shown as the time of an image
            side = self._inputs[name].stored_size
            self._ask(name, np.zeros((1, side, side, 3), np.uint8), 1)

    def __call__(self, image: Path, top_k: int = 5) -> tuple[NDArray[np.uint8], list[Answer]]:
        """The image as a square, uint8 (side, side, 3), and what each adapter says of it.

        Raises:
            DataError: It cannot be read; the message names the file without its folder.
        """
        squares = {name: self._square(self._inputs[name], image) for name in self.names}
        first = next(iter(self._inputs.values()))
        shown = ImageTransform(first.preprocess, SHOWN_SIDE, 1.0)
        with self._one_at_a_time:
            return self._square(shown, image)[0], [self._ask(name, squares[name], top_k) for name in self.names]

    def _square(self, inputs: ImageTransform, image: Path) -> NDArray[np.uint8]:
        square_1SS3, problems = inputs.squares([image])
        if problems:
            raise DataError(problems[0].replace(str(image), image.name))
        return square_1SS3

    def _ask(self, name: str, square_1SS3: NDArray[np.uint8], top_k: int) -> Answer:
        model = self.tasks.use(name)
        started = time.perf_counter()
        with torch.inference_mode():
            logits = logits_of(model(self._inputs[name].batch(square_1SS3, self.device))).float()
            best = logits.softmax(-1)[0].topk(min(top_k, len(self._classes[name])))
        values, places = best.values.tolist(), best.indices.tolist()  # read here, so that a GPU is waited for
        time_s = time.perf_counter() - started
        classes = self._classes[name]
        return Answer(name, tuple(ClassProbability(classes[c], p) for c, p in zip(places, values, strict=True)), time_s)


def _names(paths: Sequence[str | Path]) -> list[str]:
    """The last part of each path that tells it from the others, `adapter` being none."""
    parts = [[p for p in expand_home(path).resolve().parts if p != "adapter"] for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"each adapter can be shown once, but some are given twice: {', '.join(map(str, paths))}")


def _same_backbone(first_name: str, first: SavedAdapter, name: str, other: SavedAdapter) -> None:
    """Built the same way, and with the same kind of classifier, which `AdapterBank` makes after the first one's.

    Raises:
        BackboneMismatch, UsageError: It is not; both are named.
    """
    here, there = first.config["metadata"]["backbone"], other.config["metadata"]["backbone"]
    if any(here.get(key) != there.get(key) for key in ("name", "full_name", "options", "image_size", "patch_size")):
        raise _unlike(first_name, first, name, other)
    if here.get("head") != there.get("head"):
        raise UsageError(
            f"adapters side by side need one kind of classifier, but {first_name} has {here.get('head')} and {name} "
            f"{there.get('head')}: start a demo for each"
        )


def _unlike(first_name: str, first: SavedAdapter, name: str, other: SavedAdapter) -> BackboneMismatch:
    here, there = first.config["metadata"]["backbone"], other.config["metadata"]["backbone"]
    return BackboneMismatch(
        f"adapters side by side share one backbone, but {first_name} belongs to {here.get('full_name')} (weights "
        f"{here.get('weights')}) and {name} to {there.get('full_name')} (weights {there.get('weights')}): start a "
        "demo for each"
    )


def _note(saved: SavedAdapter) -> str:
    said = saved.config["metadata"]
    test = said.get("test") or {}
    good = f", {test['top1']:.2f} % top-1 on test" if isinstance(test.get("top1"), float | int) else ""
    return f"{said.get('method') or saved.config['tuner']} for {said.get('dataset', 'a task')}{good}"
