"""Leave no trace of a forward: attributes, hooks, buffers, modes and random states of a model are as they were."""

from __future__ import annotations

import contextlib
import operator
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]
CONTAINERS = (dict, list, set, deque, tuple)
MAX_ELEMENTS = 2**20
"""Larger tensors that are not parameters, such as a memory bank, are not copied: a write in place would stay."""


@contextlib.contextmanager
def undisturbed(model: nn.Module, max_elements: float = MAX_ELEMENTS) -> Iterator[None]:
    """Put the model in eval mode; afterwards restore what a forward may have changed, and the random states.

    A forward may store tensors on modules and in objects of theirs, write to buffers, or register hooks (transformers
    does, to collect hidden states). Autocast keeps no copies of weights inside: it would use them after the weights
    have changed.

    Args:
        model: Any model.
        max_elements: Larger tensors that are not parameters are not restored; a forward in train mode may write them.
    """
    modules = list(model.modules())
    state = _State(modules, max_elements)
    devices = {p.device.index for p in parameters_of(modules) if p.device.type == "cuda"}
    cache_enabled = torch.is_autocast_cache_enabled()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        for module in modules:
            module.training = False
        torch.set_autocast_cache_enabled(False)
        with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_autocast_cache_enabled(cache_enabled)
        state.restore()


def parameters_of(modules: list[nn.Module]) -> Iterator[Tensor]:
    """Yield the parameters that the modules own, in order; `Module.parameters` walks the whole tree again."""
    return (p for module in modules for p in module._parameters.values() if p is not None)


class _State:
    """The contents of everything that modules hold: attributes, caches, hooks, children, and tensors but parameters.

    Most containers are empty, and this is done for every forward that petune runs: they are checked apart.
    """

    def __init__(self, modules: list[nn.Module], max_elements: float) -> None:
        self._max_elements = max_elements
        self._empty: list[Container] = []
        self._contents: list[tuple[Container, list[Any]]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._seen: set[int] = set()
        for module in modules:
            self._add(module.__dict__, _package_of(module))

    def restore(self) -> None:
        """Undo what has changed, in place: the handle of a hook refers to the dict that holds the hook."""
        for container in self._empty:
            if container:
                container.clear()
        for container, entries in self._contents:
            now = _entries(container)
            if len(now) != len(entries) or not all(map(operator.is_, now, entries)):
                _refill(container, entries)
        for generator, random_state in self._generators:
            generator.set_state(random_state)
        with torch.no_grad():
            for tensor, values in self._tensors:
                if not torch.equal(tensor, values):  # BatchNorm's kernel writes its statistics without a new version
                    tensor.copy_(values)

    def _add(self, root: Container, package: str) -> None:
        """Keep the contents of a container, and of the containers, tensors and objects of `package` in it."""
        waiting: list[Any] = [root]
        while waiting:
            container = waiting.pop()
            if id(container) in self._seen:
                continue
            self._seen.add(id(container))
            if not container:
                self._empty.append(container)
                continue
            if type(container) is not tuple:
                self._contents.append((container, _entries(container)))
            values = container.values() if isinstance(container, dict) else container
            for value in values:
                if isinstance(value, CONTAINERS):
                    waiting.append(value)
                elif isinstance(value, Tensor):
                    self._add_tensor(value)
                    waiting.append(value.__dict__)  # a quantized weight has its scales there
                elif isinstance(value, torch.Generator):
                    self._generators.append((value, value.get_state()))
                elif _is_plain_object(value, package):
                    waiting.append(value.__dict__)

    def _add_tensor(self, tensor: Tensor) -> None:
        if type(tensor) is not Tensor or tensor.is_meta or tensor.is_inference() or id(tensor) in self._seen:
            return
        if tensor.layout is not torch.strided or tensor.numel() > self._max_elements:
            return
        self._seen.add(id(tensor))
        self._tensors.append((tensor, tensor.detach().clone()))


def _package_of(value: object) -> str:
    return type(value).__module__.partition(".")[0]


def _is_plain_object(value: object, package: str) -> bool:
    """Return True for an object with attributes that comes with its module, such as a config, and is no module.

    Objects of other packages, such as a trainer, are not the model's own: their threads may change them meanwhile.
    """
    if isinstance(value, nn.Module | type) or not hasattr(value, "__dict__"):
        return False
    own = _package_of(value)
    return own == "types" or (own == package and own not in ("petune", "torch"))


def _entries(container: Container) -> list[Any]:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def _refill(container: Container, entries: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        size = len(entries) // 2
        container.update(zip(entries[:size], entries[size:], strict=True))
    elif isinstance(container, set):
        container.update(entries)
    else:
        container.extend(entries)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Disable the adapters of all attachments; yield their modules."""
    added = {m for holder in model.modules() if hasattr(holder, "is_petune_module") for m in holder.modules()}
    holders: list[Any] = [m for m in added if hasattr(m, "enabled")]
    enabled = [holder.enabled for holder in holders]
    try:
        for holder in holders:
            holder.enabled = False
        yield added
    finally:
        for holder, state in zip(holders, enabled, strict=True):
            holder.enabled = state
