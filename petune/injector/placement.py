"""Put adapters and hooks into a model, and record them in the edit log."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from petune.base.errors import AttachError
from petune.injector.edit_log import EditLog, Placed
from petune.injector.hooks.base import Holder, idempotent
from petune.injector.hooks.prompts import order_hooks
from petune.injector.qkv import qkv_readers
from petune.injector.trainable import CONTAINERS, host_for, open_trainable_state
from petune.sites.site import Block, Site, Sites


class Placer:
    """Registers what an edit puts into a model. Everything is recorded in the log and undone with it."""

    def __init__(self, model: nn.Module, sites: Sites, log: EditLog) -> None:
        self.model = model
        self.sites = sites
        self.log = log

    def add(self, holder: Holder, near: Site, *passed: Site) -> None:
        """Register a holder next to a site, with the site's device and dtype, under a free name.

        Args:
            holder: The adapter and its hooks.
            near: The site whose module, or parent module, the holder becomes a child of.
            *passed: The sites that the forward must pass for the adapter to be called; it acts at the last one.

        Raises:
            AttachError: It would act in two blocks that share a module.
        """
        self._refuse_shared(passed[-1])
        host = self._host(near)
        role = "" if isinstance(near, Block) else f"_{near.role}"
        attribute = _free_name(host, f"petune_{self.log.label}{role}")
        weights = (p for p in self._weights(near) if p.is_floating_point())
        holder.to(next(weights, torch.empty(0, device="cpu")))
        holder.train(self.model.training)
        host.add_module(attribute, holder)
        self.log.undo_steps.append(lambda: delattr(host, attribute))
        self.log.placed.append(Placed(holder, passed))

    def hook(self, handle: RemovableHandle) -> None:
        """Remove this hook when the edit is undone."""
        hooks: Any = handle.hooks_dict_ref()
        order_hooks(hooks, handle.id)
        self.log.undo_steps.append(handle.remove)

    def toggle(self, switch: Callable[[bool], None], *, on: bool) -> None:
        """Switch `switch` on now, off and on with the attachment, and off for good when the edit is undone.

        Args:
            switch: Called with True and False.
            on: The state that it is in now.
        """
        guarded = idempotent(switch, on=on)
        guarded(True)
        self.log.toggles.append(guarded)
        self.log.undo_steps.append(lambda: guarded(False))

    def call_qkv(self, *sites: Site) -> None:
        """Let an attention call its qkv layer if one of `sites` is that layer; see `call_qkv_within`."""
        edited = {id(site.enter) for site in sites}
        for attention in qkv_readers(self.model):
            if id(attention.qkv) in edited:
                self._call_qkv_of(attention)

    def call_qkv_within(self, site: Site) -> None:
        """Let the attentions inside a site call their qkv layers for as long as the attachment is enabled."""
        for attention in qkv_readers(site.enter):
            self._call_qkv_of(attention)

    def _call_qkv_of(self, attention: Any) -> None:
        state, name = open_trainable_state(self.model, self.sites), self.log.label
        if attention.qkv_bias_separate is False or attention in state.qkv_users:
            self.toggle(lambda on: state.use_qkv_module(attention, name, on), on=False)

    def _refuse_shared(self, site: Site) -> None:
        owner = self.sites.first_owner(site)
        if owner is not None:
            raise AttachError(
                f"two blocks of {self.sites.model} share {site.where} ({site.role}). An adapter for one of them would "
                "act in both. Use a method that edits the layers inside, such as lora, or one that edits other sites"
            )

    def _host(self, site: Site) -> nn.Module:
        """Return the site's block for a block, else the module around the site; never a container of children."""
        if isinstance(site, Block):
            return host_for(site.exit)
        parent = self.model.get_submodule(site.exit_path.rpartition(".")[0])
        inside = isinstance(parent, CONTAINERS) and not isinstance(site.exit, CONTAINERS)
        return site.exit if inside else host_for(parent)

    def _weights(self, site: Site) -> Iterable[nn.Parameter]:
        """Yield the parameters at a site, then the model's; matrices first, because norms may have another dtype."""
        for module in (site.exit, self.model):
            yield from (p for p in module.parameters() if p.ndim > 1)
            yield from module.parameters()


def _free_name(module: nn.Module, base: str) -> str:
    name, number = base, 1
    while hasattr(module, name):
        name, number = f"{base}_{number}", number + 1
    return name
