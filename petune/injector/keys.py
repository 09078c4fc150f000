"""state_dict keys of a model's parameters and buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch import nn

TensorOwner = tuple[nn.Module, str]
"""The module that holds a parameter or a buffer, and its name there."""


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by state_dict key, also where a library moved a module and hides that in `state_dict`."""
    keys = _state_dict_keys(model)
    return {keys.get(id(p), name): p for name, p in model.named_parameters()}


def buffer_owners(
    model: nn.Module,
    modules: Iterable[nn.Module],
    single: Iterable[TensorOwner],
    left_out: Collection[TensorOwner] = (),
) -> dict[str, TensorOwner]:
    """Return, by state_dict key, the module that holds a buffer and the buffer's name there.

    A forward may make or replace a buffer, and a module may be taken out of the model: the owner still leads to it.

    Args:
        model: The model.
        modules: Modules whose own buffers are wanted.
        single: Further buffers, each as its module and its name there.
        left_out: Buffers that are not wanted, although their modules are; none by default.
    """
    wanted = set(modules)
    wanted_single = set(single)
    owners: dict[int | TensorOwner, tuple[str, nn.Module, str]] = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if (module in wanted and (module, name) not in left_out) or (module, name) in wanted_single:
                key = f"{path}.{name}" if path else name
                identity = (module, name) if buffer is None else id(buffer)
                owners.setdefault(identity, (key, module, name))  # several modules may share one buffer
    keys = _state_dict_keys(model) if owners else {}
    return {keys.get(id(module._buffers[name]), key): (module, name) for key, module, name in owners.values()}


def persistent_buffers(module: nn.Module) -> Iterator[TensorOwner]:
    """Yield the buffers of a module and its submodules that are part of `state_dict`, also those that are None yet."""
    for part in module.modules():
        for name in part._buffers:
            if name not in part._non_persistent_buffers_set:
                yield part, name


def non_persistent_buffers(modules: Iterable[nn.Module]) -> set[TensorOwner]:
    """Return the modules' own buffers that are no part of `state_dict`: tables that the library computes itself."""
    return {(module, name) for module in modules for name in module._non_persistent_buffers_set}


def _state_dict_keys(model: nn.Module) -> dict[int, str]:
    """Return the key of each tensor by identity; the first key of a shared one."""
    return {id(t): key for key, t in reversed(model.state_dict(keep_vars=True).items())}


def label_of(name: str) -> str:
    """Return an attachment's name as a part of state_dict keys."""
    return "".join(c if c.isalnum() or c == "_" else "_" for c in name)


def renamed_key(key: str, start: str, replacement: str) -> str:
    """Return a key in which the parts that begin with `start` begin with `replacement` instead."""
    parts = key.split(".")
    return ".".join(replacement + part.removeprefix(start) if part.startswith(start) else part for part in parts)
