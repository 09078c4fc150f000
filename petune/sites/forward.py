"""Run a model's forward, or a dry one that only has shapes, and leave no trace of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from petune.base.author import adapter_that_raised
from petune.base.errors import AttachError, PetuneError
from petune.sites.file_values import read_layer_by_layer
from petune.sites.hooked import removed_after
from petune.sites.input_spec import Inputs, InputSpec
from petune.sites.returned import attributes_of
from petune.sites.undisturbed import parameters_of, undisturbed
from petune.sites.unsuitable import advice_for, why_method_fails

LOG = logging.getLogger(__name__)

NUM_ON_META = 2
"""Samples in a forward on the meta device."""
Recorder = Callable[[], contextlib.AbstractContextManager[Any]]


def forward_of(model: nn.Module, inputs: Inputs) -> Any:
    """Return what the model returns for these inputs, in eval mode and its own number format."""
    with inference(model):
        return inputs.to(device_of(model), dtype_of(model)).call(model)


def dry_forward(model: nn.Module, spec: InputSpec, watch: Recorder = contextlib.nullcontext) -> Any:
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
        LOG.debug("no forward on the meta device; a real one follows", exc_info=True)
    try:
        with undisturbed(model), torch.no_grad():
            return _on_black_image(model, spec, watch)
    except PetuneError:  # of an adapter, which says what to do
        raise
    except Exception as error:
        name = type(model).__name__
        if adapter_that_raised(error):
            why = why_method_fails(model, error)
            raise AttachError(f"the forward of {name} fails with the method attached: {why}") from error
        raise AttachError(
            f"the forward of {name} fails on {spec}: {type(error).__name__}: {error}. {advice_for(model)}"
        ) from error


def _on_meta(model: nn.Module, spec: InputSpec, watch: Recorder) -> Any:
    inputs = meta_inputs(model, spec)
    with watch() as watched:
        functional_call(model, meta_tensors(model), inputs.args, dict(inputs.kwargs), tie_weights=False)
    return watched


def meta_inputs(model: nn.Module, spec: InputSpec, num_samples: int = NUM_ON_META) -> Inputs:
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
                tensors[f"{path}.{name}" if path else name] = _like_on_meta(tensor)
    return tensors


def _like_on_meta(tensor: Tensor) -> Tensor:
    if type(tensor) in (Tensor, nn.Parameter):
        return torch.empty_like(tensor, device="meta")
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")  # a quantized weight counts as a plain one


def _on_black_image(model: nn.Module, spec: InputSpec, watch: Recorder) -> Any:
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
def inference(model: nn.Module) -> Iterator[None]:
    """Allow a forward whose numbers are compared: `undisturbed`, without gradient, in the model's own number format.

    Weights that are in a file are read a layer at a time.
    """
    with undisturbed(model), _without_autocast(model), read_layer_by_layer(model), torch.no_grad():
        yield


@contextlib.contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Let the model compute in its own number format, even if its forward enters autocast (accelerate's does).

    A model of several formats is left alone: it may need autocast to run at all.
    """
    modules = list(model.modules())
    dtypes = {p.dtype for p in parameters_of(modules) if p.is_floating_point()}
    device = next((p.device.type for p in parameters_of(modules)), "cpu")
    if len(dtypes) > 1 or device == "meta":
        yield
        return

    def disable(module: nn.Module, args: Any) -> None:
        torch.set_autocast_enabled(device, False)  # until the model's own autocast is left

    handles = [m.register_forward_pre_hook(disable) for m in modules if m is not model]
    with removed_after(handles), torch.autocast(device, enabled=False):
        yield


def forget_caches(model: nn.Module) -> None:
    """Drop copies of weights that have changed: autocast's, and those of modules like LeViT's and TinyViT's attention.

    Such modules drop theirs when `train(True)` is called, and override `train` for that.
    """
    torch.clear_autocast_cache()
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        if type(module).train is not nn.Module.train:
            caches = {name: value for name, value in vars(module).items() if isinstance(value, dict)}
            module.train(True)
            _keep_emptied(module, caches)
    for module, training in modes:
        module.training = training


def _keep_emptied(module: nn.Module, caches: dict[str, dict[Any, Any]]) -> None:
    """Let a module keep its own dicts, emptied, where it has exchanged them for empty ones."""
    for name, cache in caches.items():
        if vars(module).get(name) == {} and vars(module)[name] is not cache:
            cache.clear()
            vars(module)[name] = cache


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, mappings, dataclasses and namespaces, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, SimpleNamespace) or hasattr(type(value), "__dataclass_fields__"):
        for item in attributes_of(value):
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
