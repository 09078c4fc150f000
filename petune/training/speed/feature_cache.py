"""What the frozen part of a model makes of each image is computed once and kept on disk for all epochs.

The result is that of a run without, to the bit where an image's row does not depend on its neighbours in the batch
(so on CPU): the same order, the same batches, the same numbers into the first layer that trains.

Legend: B batch.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from petune.data.batches import Preprocess
from petune.data.dataset import Split
from petune.training.speed.feature_store import Store
from petune.training.speed.frozen_prefix import Prefix
from petune.training.stop import StopFlag

SAY_EVERY_S = 30.0
MARK_EVERY_S = 10.0


class Features:
    """What a prefix makes of the images of some splits.

    Args:
        prefix: What is left out of the forward.
        preprocess: From image to the model's input.
        directory: Where to keep it: a folder for each split.
        key: All that the values depend on, but the images.
        device: Of the model.
        autocast: The number format of forward passes.

    Attributes:
        stores: By the name of the split.
    """

    def __init__(
        self,
        prefix: Prefix,
        preprocess: Preprocess,
        directory: Path,
        key: str,
        device: torch.device,
        autocast: Callable[[], torch.autocast],
    ) -> None:
        self.prefix, self.preprocess, self.directory, self.key = prefix, preprocess, directory, key
        self.device, self.autocast = device, autocast
        self.stores: dict[str, Store] = {}

    def of(self, part: str) -> Callable[[Tensor], Tensor] | None:
        """`logits` of a split that is kept, else None."""
        return functools.partial(self.logits, part) if part in self.stores else None

    def logits(self, part: str, positions: Tensor) -> Tensor:
        """The model's output for images that are named by their place in a split, (B,)."""
        return self.prefix.forward(self.stores[part].read(positions.numpy(), self.device))

    def open(self, splits: Mapping[str, Split]) -> None:
        """Take the room on disk.

        Raises:
            OSError: There is none.
        """
        for part, split in splits.items():
            key = f"{self.key} {self.preprocess} {digest(split)}"
            self.stores[part] = Store(self.directory / part, key, len(split), self.prefix.kept)

    def fill(self, part: str, split: Split, batch_size: int, stop: StopFlag, say: Callable[[str], None]) -> None:
        """Compute what is not there yet; every batch has the full size, so that each row is made as in training.

        Raises:
            Stopped: A signal came; what is there stays.
        """
        store, model = self.stores[part], self.prefix.model
        began, marked, said, first = time.perf_counter(), time.perf_counter(), time.perf_counter(), store.done
        training = [m for m in model.modules() if m.training]
        model.eval()
        try:
            for start in range(first, len(split), batch_size):
                if stop.signal_name is not None:
                    store.mark(start)
                    stop.check()
                rows = np.arange(start, start + batch_size) % len(split)
                x = self.preprocess.normalize(self.preprocess.pixels(split, rows, self.device))
                with self.autocast():
                    values = self.prefix.compute(x)
                store.write(start, [v[: len(split) - start] for v in values])
                now = time.perf_counter()
                if now - marked > MARK_EVERY_S:
                    store.mark(min(start + batch_size, len(split)))
                    marked = now
                if now - said > SAY_EVERY_S:
                    done = start + batch_size
                    left_s = (now - began) / (done - first) * (len(split) - done)
                    say(f"features of {part}: {done:,} of {len(split):,} images, {left_s / 60:.0f} min left")
                    said = now
            store.mark(len(split))
        finally:
            for module in training:
                module.training = True

    def close(self) -> None:
        """Take it off the disk."""
        self.stores = {}
        shutil.rmtree(self.directory, ignore_errors=True)


def why_too_large(prefix: Prefix, images: int, limit_gb: float, directory: Path) -> str:
    """Why so many images' values may not be kept in `directory`, with all sizes; empty where they may."""
    each = prefix.bytes_per_image()
    held = sum(512 * file.stat().st_blocks for file in directory.glob("*/*"))  # by a run that was stopped
    need, free = each * images, shutil.disk_usage(directory.parent).free + held
    if need <= min(limit_gb * 1e9, 0.9 * free):
        return ""
    advice = "make room there"
    if need > limit_gb * 1e9:
        advice = "change it with --set train.feature_cache_gb=GB"
    return (
        f"{images:,} images at {each / 1e3:,.1f} kB each need {need / 1e9:,.2f} GB in {directory}, but "
        f"train.feature_cache_gb allows {limit_gb:g} GB and {free / 1e9:,.1f} GB are free; {advice}"
    )


def stays_equal(
    prefix: Prefix, x_BCHW: Tensor, parameters: Mapping[str, nn.Parameter], autocast: Callable[[], torch.autocast]
) -> bool:
    """Whether the forward without its prefix gives the same logits and gradients, shown on some images.

    The parameters are moved a little meanwhile, since one that starts at zero would hide what it multiplies; gradients
    are the caller's to clear, buffers and random state the caller's to put back.
    """
    values = {key: p.detach().clone() for key, p in parameters.items()}
    with autocast():
        kept = prefix.compute(x_BCHW)
    try:
        with torch.no_grad():
            for p in parameters.values():
                p.add_(torch.randn_like(p), alpha=0.02)
        whole, rest = (_logits_and_gradients(f, parameters, autocast) for f in (
            lambda: prefix.model(x_BCHW), lambda: prefix.forward(kept)
        ))  # fmt: skip
    finally:
        with torch.no_grad():
            for key, p in parameters.items():
                p.copy_(values[key])
    same = torch.equal(whole[0], rest[0]) and whole[1].keys() == rest[1].keys()
    return same and all(torch.allclose(g, rest[1][key], rtol=1e-4, atol=1e-7) for key, g in whole[1].items())


def _logits_and_gradients(
    forward: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter], autocast: Callable[[], torch.autocast]
) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    for p in parameters.values():
        p.grad = None
    with autocast():
        logits = forward()
    logits.float().square().mean().backward()  # type: ignore[no-untyped-call]
    return logits.detach(), {key: p.grad for key, p in parameters.items() if p.grad is not None}


def digest(split: Split) -> str:
    """Of the rows of a split and of a thousand of its images, spread evenly."""
    found: Any = hashlib.sha256(split.rows.tobytes())
    found.update(f"{split.images.shape} {split.crop}".encode())
    for row in split.rows[:: max(1, len(split) // 1000)]:
        found.update(split.images[row].tobytes())
    return str(found.hexdigest())
