"""What of a forward never changes while training, and a forward without it.

One forward is watched: which modules are called, and which tensors each operation outside of them reads. A module that
is frozen, in eval mode and reached by no gradient is a pure function of the image: it need not run again. Of such
modules the outputs that anything else reads are kept (or, where that is less, what enters the modules that read them);
the others' only have to have the right shape.

Legend: B batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from petune.training.speed.record import Call, Recorder, forwards

WORTH = 0.2
"""The least share of the model's parameters that a prefix must hold: less is not worth reading from disk."""


@dataclass(frozen=True)
class Leaf:
    """One output of a module that is left out.

    Attributes:
        shape: Without the batch; None where the value is a constant, which `value` then is.
        factor: Rows for each image.
        kept: Its place among the values that are kept for each image; None where nobody reads it.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype = torch.float32
    factor: int = 1
    kept: int | None = None
    value: Any = None


@dataclass(frozen=True)
class StandIn:
    """A module that is left out, and what it returns instead."""

    module: nn.Module
    leaves: tuple[Leaf, ...]
    spec: TreeSpec

    def output(self, kept: Sequence[Tensor], rows: int, device: torch.device) -> Any:
        """What the module would have returned, as far as anybody reads it; blanks for so many images else."""
        values = []
        for leaf in self.leaves:
            if leaf.shape is None:
                values.append(leaf.value)
            elif leaf.kept is None:
                blank = torch.zeros((), dtype=leaf.dtype, device=device)
                values.append(blank.expand(leaf.factor * rows, *leaf.shape))
            else:
                values.append(kept[leaf.kept])
        return tree_unflatten(values, self.spec)


@dataclass(frozen=True)
class Entry:
    """A module that runs, and the place of its first argument among the values that are kept for each image."""

    module: nn.Module
    kept: int


@dataclass(frozen=True)
class Prefix:
    """The part of a model that need not run again.

    Attributes:
        model: The model.
        stand_ins: The modules that are left out, in the order of the forward.
        entries: Modules that get what was kept.
        kept: Shape (without the batch) and dtype of what is kept of each image.
        image_shape: Of an image, (channels, height, width).
        lean: Whether what nobody reads is given for one image, whatever the batch: what a model's own code makes of
            it then costs nothing. A model may need it for as many as there are.
    """

    model: nn.Module
    stand_ins: tuple[StandIn, ...]
    entries: tuple[Entry, ...]
    kept: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    image_shape: tuple[int, ...]
    lean: bool = False

    def bytes_per_image(self) -> int:
        """How much is kept of one image."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.kept)

    def forward(self, kept: Sequence[Tensor]) -> Tensor:
        """The model's output from what was kept, (B, …) each."""
        rows, device = 1 if self.lean else len(kept[0]), kept[0].device
        x_BCHW = torch.zeros((), device=device).expand(rows, *self.image_shape)
        instead = {s.module: _returning(s.output(kept, rows, device)) for s in self.stand_ins}
        instead |= {e.module: _entered_by(kept[e.kept], e.module.forward) for e in self.entries}
        with forwards(instead):
            out: Tensor = self.model(x_BCHW)
        return out

    def compute(self, x_BCHW: Tensor) -> list[Tensor]:
        """What is to be kept of these images; the forward ends where the last of it is there."""
        found: dict[int, Tensor] = {}

        def keep(place: int | None, value: Any) -> None:
            if place is not None:
                found[place] = value
            if len(found) == len(self.kept):
                raise _Enough

        watched = {e.module: _telling_input(e, keep) for e in self.entries}
        watched |= {s.module: _telling_output(s, keep) for s in self.stand_ins}
        with torch.no_grad(), contextlib.suppress(_Enough), forwards(watched):
            self.model(x_BCHW)
        return [found[i] for i in range(len(self.kept))]


class _Enough(Exception):
    """Ends a forward whose rest is not needed."""


def find_prefix(model: nn.Module, images: Callable[[int], Tensor]) -> Prefix | None:
    """The frozen prefix of a model in train mode, or None where there is none that is worth it.

    Args:
        model: As it trains; its buffers and the random state are the caller's to put back.
        images: Makes so many different images.
    """
    x = images(5)
    first, second = (Recorder(model).record(part) for part in (x[:2], x[2:]))
    calls = first.left_out()
    if calls is None or not worth_it(model, (p for c in calls for p in first.calls[c].module.parameters())):
        return None
    twins = {c.module: c for c in second.calls}
    found = [_cut(first, twins, calls, first.entries(calls) if early else {}) for early in (False, True)]
    return min((p for p in found if p is not None), key=Prefix.bytes_per_image, default=None)


def _cut(first: Recorder, twins: dict[nn.Module, Call], calls: set[int], entries: dict[int, int]) -> Prefix | None:
    """The prefix that is left out with these calls, where what enters some others is kept too."""
    live, _, entered = first.live(calls, entries)
    kept: list[tuple[tuple[int, ...], torch.dtype]] = []
    places: dict[int, int] = {}  # by identity of the tensor
    chosen = []
    for number in sorted(entered):
        call = first.calls[number]
        if id(call.first) not in places:
            leaf = _leaf(call.first, twins[call.module].first, {id(call.first)}, kept)
            if leaf is None or leaf.kept is None:
                return None
            places[id(call.first)] = leaf.kept
        chosen.append(Entry(call.module, places[id(call.first)]))
    stand_ins = []
    for number in sorted(calls):
        call = first.calls[number]
        leaves = [_leaf(a, b, live, kept) for a, b in zip(call.leaves, twins[call.module].leaves, strict=True)]
        if any(leaf is None for leaf in leaves) or call.spec is None:
            return None
        stand_ins.append(StandIn(call.module, tuple(leaf for leaf in leaves if leaf is not None), call.spec))
    image = tuple(first.x.shape[1:])
    return Prefix(first.model, tuple(stand_ins), tuple(chosen), tuple(kept), image) if kept else None


def _leaf(a: Any, b: Any, live: set[int], kept: list[tuple[tuple[int, ...], torch.dtype]]) -> Leaf | None:
    """From an output for two images and for three others; None where it is nothing that can be kept."""
    if not isinstance(a, Tensor):
        return Leaf(None, value=a) if a == b else None
    if a.shape == b.shape and torch.equal(a, b):
        return Leaf(None, value=a.detach().clone())
    shape, factor = tuple(a.shape[1:]), a.shape[0] // 2
    if tuple(b.shape[1:]) != shape or (a.shape[0], b.shape[0]) != (2 * factor, 3 * factor):
        return None
    if id(a) not in live:
        return Leaf(shape, a.dtype, factor)
    if factor != 1:  # rows that are not images: windows
        return None
    kept.append((shape, a.dtype))
    return Leaf(shape, a.dtype, kept=len(kept) - 1)


def worth_it(model: nn.Module, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether these are a large enough part of the model's to be worth leaving out."""
    return sum({id(p): p.numel() for p in parameters}.values()) >= WORTH * sum(p.numel() for p in model.parameters())


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _entered_by(kept: Tensor, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *args, **kwargs: forward(kept, *args, **kwargs)


def _telling_input(entry: Entry, keep: Callable[[int | None, Any], None]) -> Callable[..., Any]:
    original = entry.module.forward

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        keep(entry.kept, x)
        return original(x, *args, **kwargs)

    return forward


def _telling_output(stand_in: StandIn, keep: Callable[[int | None, Any], None]) -> Callable[..., Any]:
    original = stand_in.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        for leaf, value in zip(stand_in.leaves, tree_flatten(out)[0], strict=True):
            keep(leaf.kept, value)
        return out

    return forward
