"""Training batches as `Tuner.calibrate` reads them before the first step, and the record that it has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petune.base.errors import UsageError
from petune.injector.hooks.base import first_tensor, part_of, to_channels_last
from petune.sites.forward import tensors_in
from petune.sites.hooked import removed_after
from petune.sites.input_spec import Inputs
from petune.sites.logits import logits_of
from petune.sites.site import Site

OTHER_SPLITS = {"val", "valid", "validation", "test", "testing"}
"""Values of an attribute `split` of a dataset whose images must not choose what trains."""

SAME_ROWS = 0.05
"""Largest difference of equal rows in batches of two sizes, relative to the largest value: half precision rounds."""
Read = Callable[[int, Site, dict[int, Tensor]], Any]
"""Puts a hook at a site, which keeps what it reads by the site's number."""
Loss = Callable[[Any, Any], Tensor]
"""Maps the model's output and the target of a batch to a scalar."""


@dataclass(frozen=True)
class CalibrationBatch:
    """A batch of training samples that `Tuner.calibrate` reads.

    Attributes:
        model: The model, in eval mode.
        inputs: What it takes: a tensor (B, …), or `Inputs`.
        target: As the loss takes it.
        compute_loss: Maps the model's output and the target to a scalar.
    """

    model: nn.Module
    inputs: Any
    target: Any
    compute_loss: Loss

    def run(self) -> Any:
        """Return what the model returns for the inputs."""
        return self.inputs.call(self.model) if isinstance(self.inputs, Inputs) else self.model(self.inputs)

    def loss(self) -> Tensor:
        """Run the model and return the mean loss of the batch, with its graph."""
        return self.compute_loss(self.run(), self.target)

    def entering(self, sites: Sequence[Site]) -> list[Tensor]:
        """Run the model and return what enters each site, (B, …, D), also where an image is several rows (windows)."""

        def read(index: int, site: Site, found: dict[int, Tensor]) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                found[index] = to_channels_last(first_tensor(args, kwargs), site.layout)

            return site.enter.register_forward_pre_hook(hook, with_kwargs=True)

        return self._by_image(read, sites)

    def leaving(self, sites: Sequence[Site]) -> list[Tensor]:
        """Run the model and return what leaves each site, (B, …, D)."""

        def read(index: int, site: Site, found: dict[int, Tensor]) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                y = part_of(next(tensors_in(output)), site.part, site.layout)
                found[index] = to_channels_last(y, site.layout)

            return site.exit.register_forward_hook(hook)

        return self._by_image(read, sites)

    def _by_image(self, read: Read, sites: Sequence[Site]) -> list[Tensor]:
        """Run the model and return what is read, with the rows of one image together."""
        found = self._run_with(read, sites)
        images = self.inputs
        if not isinstance(images, Tensor) or all(len(y) == len(images) for y in found):
            return found
        with torch.no_grad():
            first = replace(self, inputs=images[:1])._run_with(read, sites)
        return [_rows_by_image(*item, len(images)) for item in zip(sites, found, first, strict=True)]

    def _run_with(self, read: Read, sites: Sequence[Site]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        handles = [read(index, site, found) for index, site in enumerate(sites)]
        with removed_after(handles):
            self.run()
        missing = [site.where for index, site in enumerate(sites) if index not in found]
        if missing:
            raise UsageError(f"calibrate reads {missing[0]}, which the forward does not pass. Read another site")
        return [found[index] for index in range(len(sites))]


def _rows_by_image(site: Site, y: Tensor, first: Tensor, num_images: int) -> Tensor:
    """Return (B, …) of (B · rows, …), if the first image's rows, known from a forward of it alone, are the first ones.

    Raises:
        UsageError: They are not.
    """
    if len(y) == num_images:
        return y
    rows = len(first)
    limit = SAME_ROWS * float(first.abs().max())
    if len(y) != rows * num_images or not bool(((y[:rows].detach() - first).abs() <= limit).all()):
        raise UsageError(
            f"calibrate reads {site.where}, whose rows are not those of one image after the other. Read another site"
        )
    return y.reshape(num_images, rows, *y.shape[1:])


class CalibrationBatches:
    """The training batches, one after the other; each iteration begins with the first.

    Args:
        model: The model.
        batches: Pairs of inputs and target, or finished `CalibrationBatch`es.
        loss: See `CalibrationBatch.compute_loss`; None takes the cross-entropy of the logits.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], loss: Loss | None) -> None:
        refuse_other_splits(batches)
        self._model = model
        self._batches = batches
        self._loss = loss or _cross_entropy

    def __iter__(self) -> Iterator[CalibrationBatch]:
        number = 0
        for number, item in enumerate(self._batches, 1):  # noqa: B007
            if isinstance(item, CalibrationBatch):
                yield item
                continue
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise UsageError(
                    f"calibrate takes batches of (inputs, target), but was given {type(item).__name__}. Pass a "
                    "DataLoader of the training split, or a list of such pairs"
                )
            yield CalibrationBatch(self._model, item[0], item[1], self._loss)
        if not number:
            raise UsageError("calibrate was given no batch. Pass batches of the training split, such as its DataLoader")


class CalibrationState(nn.Module):
    """Records in a buffer, and so in every file, that the method was calibrated.

    Attributes:
        done: 1 if it was; uint8.
    """

    done: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros((), dtype=torch.uint8, device=device))


def refuse_other_splits(batches: object) -> None:
    """Check that batches are not those of a validation or test split, as far as their dataset says.

    Raises:
        UsageError: They are, or `batches` are no batches at all.
    """
    if not isinstance(batches, Iterable):
        raise UsageError(f"calibrate takes batches of (inputs, target), not {type(batches).__name__}")
    dataset: Any = batches
    for _ in range(8):  # a DataLoader holds a dataset, which may be a Subset of another one
        split, train = getattr(dataset, "split", None), getattr(dataset, "train", None)
        if (isinstance(split, str) and split.lower() in OTHER_SPLITS) or train is False:
            raise UsageError(
                f"calibrate was given the split {split or 'test'!r} of {type(dataset).__name__}. What trains must not "
                "be chosen on images that measure it: pass batches of the training split"
            )
        dataset = getattr(dataset, "dataset", None)


def _cross_entropy(output: Any, target: Any) -> Tensor:
    return F.cross_entropy(logits_of(output), target)
