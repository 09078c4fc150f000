"""Resolve what a user names as the heads: paths, modules, and patterns of paths."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from petune.base.config import shown
from petune.base.errors import AttachError, UsageError
from petune.sites.heads_by_library import NamedModules

HeadChoice = str | nn.Module | Sequence[str | nn.Module]
"""The heads as a user names them: a dotted path, a module of the model, a pattern such as `*_embed`, or several."""

PATTERN = frozenset("*?[")


def resolve_heads(model: nn.Module, choice: HeadChoice) -> NamedModules:
    """Return path and module of each head, in the order of the choice, without those inside another one.

    Raises:
        AttachError: There is no such module, or it has no parameters.
        UsageError: The choice is empty, or holds something else than paths and modules.
    """
    entries = [choice] if isinstance(choice, str | nn.Module) else list(_entries(choice))
    if not entries:
        raise UsageError("head is empty. Name the modules that are heads; to train none, use train_head=False")
    own = {id(module): path for path, module in model.named_modules()}
    if any(entry is model or entry == "" for entry in entries):
        raise AttachError("head is the whole model. Name modules inside it, or use the method full to train everything")
    heads = [own[id(module)] for entry in entries for module in _modules_of(model, entry, own)]
    return outermost([(path, model.get_submodule(path)) for path in dict.fromkeys(heads)])


def outermost(modules: Iterable[tuple[str, nn.Module]]) -> NamedModules:
    """Return the modules without those that are inside another one of them, each once."""
    every = {id(module): (path, module) for path, module in reversed([*modules])}
    inside = {id(m) for _, module in every.values() for m in module.modules() if m is not module}
    return [(path, module) for path, module in reversed(every.values()) if id(module) not in inside]


def has_parameters(module: nn.Module) -> bool:
    """Return whether a module, or one inside, has a parameter."""
    return next(module.parameters(), None) is not None


def _entries(choice: object) -> Sequence[str | nn.Module]:
    if isinstance(choice, list | tuple) and all(isinstance(entry, str | nn.Module) for entry in choice):
        return choice
    raise UsageError(
        "head must be a path, a module of the model, a pattern such as '*_embed', or a list of them, not "
        f"{shown(choice, 60)}"
    )


def _modules_of(model: nn.Module, entry: str | nn.Module, own: dict[int, str]) -> list[nn.Module]:
    name = type(model).__name__
    if isinstance(entry, nn.Module):
        if id(entry) not in own or not has_parameters(entry):
            raise AttachError(f"head: the {type(entry).__name__} is not a module of {name} with parameters")
        return [entry]
    modules = dict(model.named_modules(remove_duplicate=False))
    if entry in modules and has_parameters(modules[entry]):
        return [modules[entry]]
    matches = [(p, m) for p, m in modules.items() if p and fnmatchcase(p, entry) and has_parameters(m)]
    if PATTERN & set(entry) and matches:
        return [module for _, module in outermost(matches)]
    if entry in dict(model.named_parameters()):
        raise AttachError(
            f"head={shown(entry, 60)} is a parameter of {name}, and a head is a module. Put it into a module of its own"
        )
    near = difflib.get_close_matches(entry, [path for path, m in modules.items() if path and has_parameters(m)], n=3)
    advice = f"Did you mean {' or '.join(near)}?" if near else "Give its dotted path, a pattern, or the module itself"
    raise AttachError(f"head={shown(entry, 60)} is not a module of {name} with parameters. {advice}")
