"""Find the linear layers whose own forward is the only reader of their weight: others cannot be replaced in a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from petune.sites.forward import dry_forward, tensors_in
from petune.sites.hooked import removed_after
from petune.sites.input_spec import InputSpec


def run_by_own_forward(model: nn.Module, spec: InputSpec, layers: Iterable[nn.Linear]) -> list[nn.Linear]:
    """Return those of `layers` that one forward in eval mode calls, and whose weight nothing else reads.

    BEiT, EVA-02 and SwinV2 read the weight of a layer themselves, `F.linear(x, weight=self.qkv.weight)`.

    Args:
        model: Modes and random state are as before afterwards.
        spec: What it takes.
        layers: Linear layers of the model.

    Raises:
        AttachError: The forward fails.
    """
    candidates = list(layers)

    @contextlib.contextmanager
    def watch() -> Iterator[_WeightReads]:
        reads = _WeightReads(candidates)
        handles = [model.register_forward_pre_hook(reads.start, prepend=True)]
        for layer in candidates:
            handles += [layer.register_forward_pre_hook(reads.enter), layer.register_forward_hook(reads.leave)]
        with removed_after(handles), reads:
            yield reads

    reads: _WeightReads = dry_forward(model, spec, watch)
    return [layer for layer in candidates if layer in reads.called and layer not in reads.read_by_others]


class _WeightReads(TorchFunctionMode):
    """Records which layers are called, and whose weight an operation outside of their forward reads."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = layers
        self.called: set[nn.Module] = set()
        self.read_by_others: set[nn.Module] = set()
        self._running: set[nn.Module] = set()
        self._owners: dict[int, set[nn.Module]] = {}

    def start(self, model: nn.Module, args: Any) -> None:
        """Look up the weights, which are on the meta device from now on, and which layers may share."""
        for layer in self.layers:
            self._owners.setdefault(id(layer.weight), set()).add(layer)

    def enter(self, layer: nn.Module, args: Any) -> None:
        self.called.add(layer)
        self._running.add(layer)

    def leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._running.discard(layer)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if next(tensors_in(result), None) is not None:  # a shape or a dtype is no value
            for tensor in tensors_in((args, kwargs or {})):
                self._note_read(tensor)
        return result

    def _note_read(self, tensor: Tensor) -> None:
        owners = self._owners.get(id(tensor), set())
        if not owners & self._running:
            self.read_by_others |= owners
