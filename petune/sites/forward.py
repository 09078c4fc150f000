"""Run a model's forward and leave no trace of it: attributes, hooks, modes and random state stay as they are."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from petune.base.errors import AttachError
from petune.sites.input_spec import Inputs, InputSpec
from petune.sites.unsuitable import advice_for

Watch = Callable[[], contextlib.AbstractContextManager[Any]]
Container = dict[Any, Any] | list[Any] | set[Any]


def forward_of(model: nn.Module, inputs: Inputs) -> Any:
    """Return what the model returns for these inputs, in eval mode and its own number format."""
    with inference(model):
        return inputs.to(device_of(model), dtype_of(model)).call(model)


def dry_forward(model: nn.Module, spec: InputSpec, watch: Watch = contextlib.nullcontext) -> Any:
    """Run one no-grad forward in eval mode, for its shapes alone, and return what `watch` yielded during it.

    The forward runs on the meta device (shapes without numbers: milliseconds, no copy of weights). If that fails,
    because the model computes with tensors that are neither parameters nor buffers, it runs on one black image.

    Args:
        model: Any model; see `undisturbed`.
        spec: What it takes.
        watch: Makes a fresh context manager for each attempt.

    Raises:
        AttachError: The model's own forward fails on such inputs.
    """
    try:
        with undisturbed(model), torch.no_grad():
            return _on_meta(model, spec, watch)
    except Exception:  # a constant tensor on another device, an op without a meta kernel, a value that is read
        pass
    try:
        with undisturbed(model), torch.no_grad():
            return _on_black_image(model, spec, watch)
    except Exception as error:
        raise AttachError(
            f"the forward of {type(model).__name__} fails on {spec}: {type(error).__name__}: {error}. "
            f"{advice_for(model)}"
        ) from error


def _on_meta(model: nn.Module, spec: InputSpec, watch: Watch) -> Any:
    inputs = meta_inputs(model, spec)
    with watch() as watched:
        functional_call(model, meta_tensors(model), inputs.args, dict(inputs.kwargs), tie_weights=False)
    return watched


def meta_inputs(model: nn.Module, spec: InputSpec, num_samples: int = 2) -> Inputs:
    """Return inputs on the meta device, in the model's dtype."""
    return spec.zeros(num_samples, "meta").to("meta", dtype_of(model))


def meta_output(model: nn.Module, spec: InputSpec, num_samples: int) -> Any:
    """Return what the model returns on the meta device: shapes without numbers. Not every model runs there."""
    inputs = meta_inputs(model, spec, num_samples)
    with undisturbed(model), torch.no_grad():
        return functional_call(model, meta_tensors(model), inputs.args, dict(inputs.kwargs), tie_weights=False)


def meta_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return meta tensors for all parameters and buffers. A module that is shared must not be swapped twice."""
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                tensors[f"{path}.{name}" if path else name] = torch.empty_like(tensor, device="meta")
    return tensors


def _on_black_image(model: nn.Module, spec: InputSpec, watch: Watch) -> Any:
    with watch() as watched:
        black_image(model, spec).call(model)
    return watched


def black_image(model: nn.Module, spec: InputSpec) -> Inputs:
    """Return inputs of one sample whose content is zero, where the model is and in its dtype."""
    device = device_of(model)
    return spec.zeros(1, device).to(device, dtype_of(model))


def device_of(model: nn.Module) -> torch.device:
    """Return the device that images must be on."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype that images must have."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; afterwards restore every module's attributes, hooks and mode, and the random states.

    A forward may store tensors on modules, or register hooks (transformers does, to collect hidden states). Autocast
    keeps no copies of weights inside: it would use them after the weights have changed.
    """
    modules = list(model.modules())
    attributes = [_Attributes(module) for module in modules]
    devices = {p.device.index for p in _parameters_of(modules) if p.device.type == "cuda"}
    cache_enabled = torch.is_autocast_cache_enabled()
    try:
        for module in modules:
            module.training = False
        torch.set_autocast_cache_enabled(False)
        with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
            yield
    finally:
        torch.set_autocast_cache_enabled(cache_enabled)
        for saved in attributes:
            saved.restore()


def _parameters_of(modules: list[nn.Module]) -> Iterator[Tensor]:
    """Yield the parameters that the modules own, in order; `Module.parameters` walks the whole tree again."""
    return (p for module in modules for p in module._parameters.values() if p is not None)


class _Attributes:
    """The attributes of a module, with the contents of its dicts, lists and sets: caches, hooks, buffers, children.

    Most of these containers are empty, and this is done for every forward that petune runs: they are checked apart.
    """

    def __init__(self, module: nn.Module) -> None:
        own = module.__dict__
        containers = [own, *(value for value in own.values() if isinstance(value, dict | list | set))]
        self._empty = [container for container in containers if not container]
        self._contents = [(container, _entries(container)) for container in containers if container]

    def restore(self) -> None:
        """Undo what has changed, in place: the handle of a hook refers to the dict that holds the hook."""
        for container in self._empty:
            if container:
                container.clear()
        for container, entries in self._contents:
            now = _entries(container)
            if len(now) != len(entries) or not all(map(operator.is_, now, entries)):
                _refill(container, entries)


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
def inference(model: nn.Module) -> Iterator[None]:
    """Allow a forward whose numbers are compared: `undisturbed`, without gradient, in the model's own number format."""
    with undisturbed(model), _without_autocast(model), torch.no_grad():
        yield


@contextlib.contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Let the model compute in its own number format, even if its forward enters autocast (accelerate's does).

    A model of several formats is left alone: it may need autocast to run at all.
    """
    modules = list(model.modules())
    dtypes = {p.dtype for p in _parameters_of(modules) if p.is_floating_point()}
    device = next((p.device.type for p in _parameters_of(modules)), "cpu")
    if len(dtypes) > 1 or device == "meta":
        yield
        return

    def disable(module: nn.Module, args: Any) -> None:
        torch.set_autocast_enabled(device, False)  # until the model's own autocast is left

    handles = [m.register_forward_pre_hook(disable) for m in modules if m is not model]
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for handle in handles:
            handle.remove()


def forget_caches(model: nn.Module) -> None:
    """Drop copies of weights that have changed: autocast's, and those of modules like LeViT's and TinyViT's attention.

    Such modules drop theirs when `train(True)` is called, and override `train` for that.
    """
    torch.clear_autocast_cache()
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        if type(module).train is not nn.Module.train:
            module.train(True)
    for module, training in modes:
        module.training = training


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def logits_in(output: Any) -> Any:
    """Return what is called `logits` in a model's output, an attribute (transformers) or an entry; else the output."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    return getattr(output, "logits", output)
