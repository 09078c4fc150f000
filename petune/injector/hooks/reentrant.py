"""Refuse reentrant gradient checkpointing where it leaves what trains without a gradient.

It runs a part of the model without gradients, and again in the backward pass if something that enters requires one.
With frozen patches nothing does, so whatever trains inside would silently learn nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from petune.base.errors import AttachError
from petune.injector.hooks.base import Holder
from petune.sites.forward import tensors_in
from petune.sites.site import modules_of
from petune.sites.sites import Sites

FORWARD = "CheckpointFunction.forward"
"""What runs a part without gradients, in PyTorch and in the libraries that have copied it."""


class ReentrantCheck:
    """Hooks on a model, and in each forward that trains on its blocks; bound methods follow a deep copy of the model.

    Hooks that stayed on the blocks would keep torch's encoder layers from their fused kernel.

    Attributes:
        blocks: The blocks, by the module that is entered first.
        looks_inside: Look at every module that trains in the next forward: a block may checkpoint a part of itself.
        read: Modules that adapters read, which may be inside where an adapter acts outside.
        handles: Of the hooks in this forward.
    """

    def __init__(self, sites: Sites) -> None:
        self.blocks = {block.enter: block for block in sites.all_blocks}
        self.looks_inside = True
        self.read: set[nn.Module] = set()
        self.handles: list[RemovableHandle] = []

    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on the model."""
        enter = model.register_forward_pre_hook(self.enter, prepend=True)
        return [enter, model.register_forward_hook(self.leave, always_call=True)]

    def enter(self, model: nn.Module, args: Any) -> None:
        """Watch a forward that trains; pre-hook of the model."""
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        self.remove()  # what a forward has left that was interrupted
        if getattr(model, "_is_replica", False):  # nn.DataParallel's share their hooks, in several threads
            return
        watched = dict.fromkeys(self.blocks)
        if self.looks_inside:
            self.read = _read_by_adapters(model)
            watched |= dict.fromkeys([*self.read, *(m for m in model.modules() if _trains(m, recurse=False))])
            self.looks_inside = False
        self.handles = [m.register_forward_pre_hook(self.check, prepend=True) for m in watched]

    def leave(self, model: nn.Module, args: Any, output: Any) -> None:
        """Stop watching; hook of the model, also called after an exception."""
        if not torch.compiler.is_compiling():
            self.remove()

    def check(self, module: nn.Module, args: Any) -> None:
        """Check that what trains in a module gets a gradient; pre-hook.

        Raises:
            AttachError: Reentrant checkpointing cuts it off.
        """
        if torch.is_grad_enabled() or not _is_cut_off():
            return
        block = self.blocks.get(module)
        inside = modules_of([block]) if block is not None else [module]
        if module in self.read or any(_trains(m, recurse=True) for m in inside):
            self.looks_inside = True
            name = type(module).__name__ if block is None else block.path
            raise AttachError(
                f"gradient checkpointing with use_reentrant=True gives what trains in {name} no or wrong gradients, "
                "because nothing that enters it requires one. Use use_reentrant=False; in timm, "
                "timm.layers.set_reentrant_ckpt(False) and no TIMM_REENTRANT_CKPT"
            )

    def remove(self) -> None:
        """Remove the hooks of a forward."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handles": []}


def _read_by_adapters(model: nn.Module) -> set[nn.Module]:
    named = dict(model.named_modules(remove_duplicate=False))
    holders = [m for m in named.values() if isinstance(m, Holder) and m.enabled]
    return {named[path] for holder in holders for path in holder.passed if path in named}


def _trains(module: nn.Module, *, recurse: bool) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=recurse))


def _is_cut_off() -> bool:
    """Return True inside of reentrant checkpointing if nothing that entered it requires a gradient.

    Several may be nested; what entered the outermost one decides. PyTorch does not say that it is inside of one, but
    the stack does.
    """
    frame, entered = sys._getframe(), []
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_qualname == FORWARD:
            entered.append([*tensors_in(tuple(frame.f_locals.values()))])
    return bool(entered) and not any(x.requires_grad for tensors in entered for x in tensors)
