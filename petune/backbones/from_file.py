"""Build a model on the meta device and read each tensor of its weights file straight into place.

The usual way draws random values for every parameter, reads the whole file, and copies it over them: a model of a
billion parameters then takes two to three times its size. Whatever does not work on the meta device is built that way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from petune.sites.file_values import MappedFile, can_map, keep_in_file
from petune.sites.heads_by_library import classifiers_of

_LOCK = threading.RLock()
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights may stay in the file: these are nearly all of a Transformer."""


def is_safetensors(file: Path) -> bool:
    """Return whether a file can be mapped, by its name; what is in it is checked when it is read."""
    return file.suffix == ".safetensors" and can_map()


def build_from_file(build: Callable[[], nn.Module], file: Path, *, stay_in_file: bool = False) -> nn.Module | None:
    """Build a model and fill it from a safetensors file.

    Args:
        build: Builds the model as usual, with the weights that it reads from the file.
        file: The weights, in a file that safetensors has checked.
        stay_in_file: Leave the matrices in the file; see `petune.sites.file_values`.

    Returns:
        None if that is not possible, or fails: build it the usual way, which says what is wrong. The values of the last
        layer of the classifier are zero, if the file has none.
    """
    with suppress(Exception):  # also a fault of the weights, which the usual way reports
        mapped = MappedFile(file)
        with _parameters_on_meta(mapped) as dtypes:
            model = build()
        _fill(model, mapped, dtypes, stay_in_file=stay_in_file)
        return model if has_values(model) else None
    return None


def build_empty(build: Callable[[], nn.Module]) -> nn.Module | None:
    """Build a model on the meta device, but for its buffers and the last layer of its classifier, which is zero.

    Returns:
        None if that is not possible; see `build_from_file`.
    """
    with suppress(Exception), _parameters_on_meta():
        model = build()
        for layer in _last_layers(model):
            _fill_with_zeros(layer)
        return None if any(b.is_meta for b in model.buffers()) else model  # computed from parameters
    return None


def fill_empty(model: nn.Module, tensors: Mapping[str, Tensor], mapped: MappedFile, *, stay_in_file: bool) -> None:
    """Fill what `build_empty` left on the meta device, and copy the other tensors in.

    Args:
        model: The model.
        tensors: For all of its keys on the meta device, in the same shapes.
        mapped: The file that they are from.
        stay_in_file: See `build_from_file`.
    """
    named = model.state_dict(keep_vars=True)
    dtypes = {key: t.dtype for key, t in named.items()}
    filled = {key: t for key, t in tensors.items() if not named[key].is_meta}
    model.load_state_dict(filled, strict=False)
    model.load_state_dict({key: t for key, t in tensors.items() if key not in filled}, strict=False, assign=True)
    _fill(model, mapped, dtypes, stay_in_file=stay_in_file)


def read_mapped(model: nn.Module, mapped: MappedFile, *, stay_in_file: bool) -> None:
    """Read what a model has of a mapped file into memory, but what stays in the file; see `build_from_file`."""
    _fill(model, mapped, {key: t.dtype for key, t in model.state_dict().items()}, stay_in_file=stay_in_file)


def has_values(module: nn.Module) -> bool:
    """Return whether no parameter or buffer is on the meta device."""
    return not any(t.is_meta for t in (*module.parameters(), *module.buffers()))


@contextmanager
def _parameters_on_meta(mapped: MappedFile | None = None) -> Iterator[dict[str, torch.dtype]]:
    """Put the parameters of models that this thread builds on the meta device; buffers keep their values.

    Args:
        mapped: Whoever loads this file gets its mapped tensors.

    Yields:
        By key, the dtypes of what `load_state_dict` has filled.
    """
    register, load = nn.Module.register_parameter, nn.Module.load_state_dict
    load_file = safetensors.torch.load_file
    thread = threading.get_ident()
    dtypes: dict[str, torch.dtype] = {}
    seen: dict[int, nn.Parameter] = {}

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is None or threading.get_ident() != thread:
            return
        if type(param) is not nn.Parameter or id(param) in seen:
            # a lazy module; or tied weights, which would come apart
            raise NotImplementedError(f"{name} cannot be built on the meta device")
        on_meta = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        seen[id(on_meta)] = on_meta
        module._parameters[name] = on_meta

    def load_by_assigning(module: nn.Module, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if threading.get_ident() != thread:
            return load(module, state_dict, strict, assign)
        named = module.state_dict(keep_vars=True)
        if len({id(t) for t in named.values()}) != len(named):
            raise NotImplementedError("tied weights cannot be assigned")
        dtypes.update({key: t.dtype for key, t in named.items()})
        return load(module, state_dict, strict, assign=True)

    def load_mapped(filename: Any, device: Any = "cpu") -> dict[str, Tensor]:
        if threading.get_ident() != thread or mapped is None or Path(filename) != mapped.path:
            return load_file(filename, device)  # type: ignore[no-any-return]
        return dict(mapped.tensors)

    with _LOCK:
        safetensors.torch.load_file = load_mapped
        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
        nn.Module.load_state_dict = load_by_assigning  # type: ignore[method-assign, assignment]
        try:
            yield dtypes
        finally:
            safetensors.torch.load_file = load_file
            nn.Module.register_parameter = register  # type: ignore[method-assign]
            nn.Module.load_state_dict = load  # type: ignore[method-assign]


def _fill(model: nn.Module, mapped: MappedFile, dtypes: Mapping[str, torch.dtype], *, stay_in_file: bool) -> None:
    """Read what is mapped into memory, each tensor in the dtype of the model, but what stays in the file."""
    for layer in _last_layers(model):
        _fill_with_zeros(layer)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, p in module._parameters.items():
            if p is None or not mapped.holds(p):
                continue
            part, dtype = mapped.slice_of(p), dtypes[prefix + name]
            if part is None:  # a part of a tensor
                p.data = p.data.clone()
                continue
            if stay_in_file and isinstance(module, MATRICES) and part.dtype == dtype == torch.float32:
                keep_in_file(p, part)
            else:
                p.data = part.read().to(dtype)
        for name, b in module._buffers.items():
            if b is not None and mapped.holds(b):
                module._buffers[name] = b.clone().to(dtypes[prefix + name])
    for key, t in model.state_dict(keep_vars=True).items():
        if key in dtypes and t.dtype != dtypes[key]:  # small ones, which were read when the file was opened
            t.data = t.data.to(dtypes[key])


def _fill_with_zeros(layer: nn.Module) -> None:
    for name, p in layer._parameters.items():
        if p is not None and p.is_meta:
            layer._parameters[name] = nn.Parameter(torch.zeros_like(p, device="cpu"), p.requires_grad)


def _last_layers(model: nn.Module) -> set[nn.Module]:
    """Return the last linear layers of the classifiers, which `set_head` fills in any case."""
    heads = classifiers_of(model) or ()
    layers = [[m for m in head.modules() if isinstance(m, nn.Linear)] for head in heads]
    return {of_head[-1] for of_head in layers if of_head}
