"""Run a model's forward once for its shapes alone, and leave no trace of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from petune.base.errors import AttachError


def dry_forward(
    model: nn.Module,
    input_size: tuple[int, int, int],
    watch: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Any:
    """Run one no-grad forward in eval mode, and return what `watch` yielded during it.

    The forward runs on the meta device (shapes without numbers: milliseconds, no copy of weights). Where a
    model computes with tensors that are neither parameter nor buffer, this fails, and it runs in earnest on
    one black image. Modes and random state are as before afterwards.

    Args:
        model: Any model that maps a batch of images to something.
        input_size: (channels, height, width).
        watch: Makes a fresh context manager for each try.

    Raises:
        AttachError: The model's own forward fails on an image of that size.
    """
    with undisturbed(model), torch.no_grad():
        try:
            return _on_meta(model, input_size, watch)
        except Exception:  # a constant tensor on another device, an op without a meta kernel, a value read
            pass
        try:
            return _in_earnest(model, input_size, watch)
        except Exception as error:
            size = "x".join(map(str, input_size))
            raise AttachError(
                f"the forward of {type(model).__name__} must run on a {size} image, but it raised "
                f"{type(error).__name__}: {error}. Pass input_size=(channels, height, width) if that is not "
                "its size"
            ) from error


def _on_meta(model: nn.Module, input_size: tuple[int, int, int], watch: Any) -> Any:
    images_BCHW = torch.zeros(2, *input_size, device="meta", dtype=dtype_of(model))
    with _caches_restored(model), watch() as seen:
        functional_call(model, _meta_tensors(model), (images_BCHW,), tie_weights=False)
    return seen


def _meta_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Stand-ins for all parameters and buffers. Each module counts once: a shared one must not be swapped twice."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[f"{path}.{name}" if path else name] = torch.empty_like(tensor, device="meta")
    return found


def _in_earnest(model: nn.Module, input_size: tuple[int, int, int], watch: Any) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with watch() as seen:
        model(torch.zeros(1, *input_size, device=device, dtype=dtype_of(model)))
    return seen


def dtype_of(model: nn.Module) -> torch.dtype:
    """What images must be converted to."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's mode and every random state as before afterwards.

    Autocast keeps no copy of a weight: it would still use it when the weight has another value.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    kept = torch.is_autocast_cache_enabled()
    try:
        for module, _ in modes:
            module.training = False
        torch.set_autocast_cache_enabled(False)
        with torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
            yield
    finally:
        torch.set_autocast_cache_enabled(kept)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """For a forward whose numbers are compared: undisturbed, without gradient, in the model's own number format."""
    with undisturbed(model), _without_autocast(model), torch.no_grad():
        yield


@contextlib.contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes in its own number format, also where its forward enters autocast (accelerate's).

    A model of several formats is left alone: it may need autocast to run at all.
    """
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    device = next((p.device.type for p in model.parameters()), "cpu")
    if len(kinds) > 1 or device == "meta":
        yield
        return

    def off(module: nn.Module, args: Any) -> None:
        torch.set_autocast_enabled(device, False)  # till its own autocast is left

    handles = [m.register_forward_pre_hook(off) for m in model.modules() if m is not model]
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _caches_restored(model: nn.Module) -> Iterator[None]:
    """Undo what a forward stored on modules, so that no meta tensor stays behind in a model's own cache."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            for key, value in list(module.__dict__.items()):
                if value is attributes.get(key):
                    continue
                if key in attributes:
                    module.__dict__[key] = attributes[key]
                else:
                    del module.__dict__[key]


def forget_caches(model: nn.Module) -> None:
    """Let what keeps a product of the weights drop it, since they changed: autocast, and modules as LeViT's, TinyViT's.

    These do so when told to train, which is why they have a `train` of their own.
    """
    torch.clear_autocast_cache()
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        if type(module).train is not nn.Module.train:
            module.train(True)
    for module, training in modes:
        module.training = training
