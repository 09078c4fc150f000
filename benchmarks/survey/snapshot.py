"""Everything of a model, and of the process around it, that looking, attaching or detaching could leave changed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ATOMS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return plain data about a model; `differences` compares two of them.

    The identity and contents of every attribute of every module are in it: submodules, parameters with their values,
    flags and gradients, buffers, hooks in their order, caches, configs, modes, and the attributes of the classes. The
    process is in it with its random states, autocast and gradient modes, and number of threads.
    """
    facts = dict(process_state())
    for path, module in model.named_modules(remove_duplicate=False):
        facts[f"{path}: class"] = (id(type(module)), tuple((k, id(v)) for k, v in vars(type(module)).items()))
        facts.update(_items(path, vars(module), set()))
    return facts


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what differs between two snapshots, by the path of the attribute."""
    keys = dict.fromkeys([*before, *after])
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if not _equal(before, after, key)]


def process_state() -> Iterator[tuple[str, Any]]:
    """Yield what belongs to the process, and not to a model."""
    yield "torch random state", _value(torch.get_rng_state())
    if torch.cuda.is_available():
        yield "CUDA random state", [_value(state) for state in torch.cuda.get_rng_state_all()]
    yield "random state", hash(random.getstate())
    yield "numpy random state", repr(np.random.get_state(legacy=False))
    yield "gradients", (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled())
    for device in ("cpu", "cuda"):
        yield f"autocast {device}", (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    yield "autocast cache", torch.is_autocast_cache_enabled()
    yield "default dtype", torch.get_default_dtype()
    yield "default device", str(torch.get_default_device())
    yield "threads", torch.get_num_threads()
    yield "deterministic", (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
    hooks = torch.nn.modules.module
    yield (
        "global hooks",
        [len(v) for k, v in sorted(vars(hooks).items()) if k.startswith("_global_") and k.endswith("hooks")],
    )


def _facts(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield the path and a comparable value of `value` and of what it contains; modules are visited by their tree."""
    if isinstance(value, ATOMS):
        yield path, value
        return
    yield path, (type(value).__name__, id(value))
    if isinstance(value, Tensor):
        yield f"{path} value", (str(value.dtype), tuple(value.shape), str(value.device), _value(value))
        yield f"{path} flags", (value.requires_grad, id(value.grad) if value.is_leaf else None)
        yield f"{path} hooks", len(value._backward_hooks or ()) + len(_post_hooks(value))
        yield from _items(f"{path} attributes", vars(value), seen)
        return
    if isinstance(value, nn.Module) or callable(value) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        yield from _items(path, value, seen)
    elif isinstance(value, list | tuple):
        yield f"{path} length", len(value)
        for index, item in enumerate(value):
            yield from _facts(f"{path}[{index}]", item, seen)
    elif isinstance(value, set | frozenset):
        yield f"{path} items", {item if isinstance(item, ATOMS) else id(item) for item in value}
    elif hasattr(value, "__dict__"):
        yield from _items(path, vars(value), seen)


def _items(path: str, value: Mapping[Any, Any], seen: set[int]) -> Iterator[tuple[str, Any]]:
    yield f"{path} keys", [key if isinstance(key, ATOMS) else id(key) for key in value]
    for key, item in value.items():
        yield from _facts(f"{path}.{key}", item, seen)


def _post_hooks(tensor: Tensor) -> Any:
    return getattr(tensor, "_post_accumulate_grad_hooks", None) or ()


def _value(tensor: Tensor) -> Any:
    """Return the contents of a tensor, as a number that changes with them."""
    if tensor.is_meta:
        return None
    try:
        return hash(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    except (RuntimeError, NotImplementedError, TypeError):  # a subclass
        return repr(tensor)


def _equal(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> bool:
    missing = object()
    x, y = before.get(key, missing), after.get(key, missing)
    return x is y or bool(x == y)
