"""Put adapters and hooks into a model, and record them in the edit log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from petune.base.arguments import LONGEST_SHOWN
from petune.base.config import shown
from petune.base.errors import AttachError
from petune.injector.attention import Attention
from petune.injector.chain import check_stream, links_of
from petune.injector.edit_log import EditLog, Placed
from petune.injector.hooks.around import Around, num_around, pass_on
from petune.injector.hooks.base import After, Before, Holder, idempotent
from petune.injector.hooks.keys_values import KeysValues
from petune.injector.hooks.prompts import order_hooks
from petune.injector.hooks.reading import Gather, Parallel
from petune.injector.hooks.side import Side, SideStep
from petune.injector.hooks.spanning import Spanning, spans_blocks
from petune.injector.hooks.stream import Stream, let_readers_keep_copies
from petune.injector.qkv import qkv_readers
from petune.injector.shared_modules import refuse_shared
from petune.injector.trainable import CONTAINERS, TrainableState, host_for
from petune.sites.required import (
    require_all_channels,
    require_editable,
    require_input,
    require_readable,
    require_stream,
    require_whole,
)
from petune.sites.site import Block, Site
from petune.sites.sites import Sites


class Placer:
    """Registers what an edit puts into a model. Everything is recorded in the log and undone with it."""

    def __init__(self, model: nn.Module, sites: Sites, log: EditLog, state: TrainableState) -> None:
        self.model = model
        self.sites = sites
        self.log = log
        self.state = state
        self._shared = sites.shared_with_left_out()

    def add(self, holder: Holder, near: Site, *passed: Site) -> None:
        """Register a holder next to a site, with the site's device and dtype, under a free name.

        Args:
            holder: The adapter and its hooks.
            near: The site whose module, or parent module, the holder becomes a child of.
            *passed: The sites that the forward must pass for the adapter to be called; it acts at the last one.

        Raises:
            AttachError: It would act in two blocks that share a module, or a parameter has no shape.
        """
        if not isinstance(holder.adapter, nn.Module):
            raise AttachError(
                f"an adapter is an nn.Module that was built, such as MyAdapter(site.dim), but was given "
                f"{shown(holder.adapter, LONGEST_SHOWN)}"
            )
        lazy = next((key for key, p in holder.adapter.named_parameters() if is_lazy(p)), None)
        if lazy is not None:
            raise AttachError(
                f"{lazy} of the adapter {type(holder.adapter).__name__} has no shape before its first forward. Use a "
                "layer with sizes, such as nn.Linear(site.dim, …)"
            )
        refuse_shared(self.sites, self._shared, passed[-1])
        host = self._host(near)
        role = "" if isinstance(near, Block) else f"_{near.role}"
        attribute = free_name(host, f"petune_{self.log.label}{role}")
        weights = (p for p in self._weights(near) if p.is_floating_point())
        holder.to(next(weights, torch.empty(0, device="cpu")))
        holder.train(self.model.training)
        host.add_module(attribute, holder)
        holders = self.state.holders
        holders.append(holder)
        holder.passed = tuple(site.path for site in passed)
        self.log.undo_steps += [lambda: delattr(host, attribute), lambda: holders.remove(holder)]
        self.log.placed.append(Placed(holder, passed))

    def hook(self, handle: RemovableHandle) -> None:
        """Remove this hook when the edit is undone."""
        hooks: Any = handle.hooks_dict_ref()
        order_hooks(hooks, handle.id)
        self.log.undo_steps.append(handle.remove)

    def parallel(self, enter: Site | Sequence[Site], exit: Site, adapter: nn.Module, *, leaving: bool) -> None:
        """See `Edit.parallel`."""
        exit = require_editable(exit, "parallel")
        enters = enter if isinstance(enter, Sequence) else [enter]
        enters = [require_readable(site, "parallel", leaving=leaving) for site in enters]
        holder = self._reader(enters, exit, adapter, leaving=leaving, single=not isinstance(enter, Sequence))
        self.call_qkv(*enters, exit)
        self.add(holder, exit, *enters, exit)
        self._read(holder, enters, leaving=leaving)
        # the innermost hook, so that the output still has the tokens that ENTER saw; it runs after an exception too
        self.hook(exit.exit.register_forward_hook(holder.leave, prepend=True, always_call=True))

    def _reader(
        self, enters: Sequence[Site], exit: Site, adapter: nn.Module, *, leaving: bool, single: bool
    ) -> Parallel | Gather:
        reads = [site.exit if leaving else site.enter for site in enters]
        if spans_blocks(self.sites, reads, exit, leaving=leaving):
            return Spanning(adapter, enters, exit, leaving=leaving, single=single)
        if single:
            return Parallel(adapter, enters[0], exit, leaving=leaving)
        return Gather(adapter, enters, exit, leaving=leaving)

    def _read(self, holder: Parallel | Gather, enters: Sequence[Site], *, leaving: bool) -> None:
        """Put in the hooks by which an adapter reads: what enters the sites, or what leaves them."""
        for index, site in enumerate(enters):
            on_input, on_output = holder.enter, holder.read_output
            if index == 0 and isinstance(holder, Gather):
                on_input, on_output = holder.enter_first, holder.read_output_first
            if leaving:
                self.hook(site.exit.register_forward_hook(on_output, prepend=True))
            else:
                self.hook(site.enter.register_forward_pre_hook(on_input, with_kwargs=True))

    def before(self, site: Site, adapter: nn.Module) -> None:
        """See `Edit.before`."""
        site = require_input(require_whole(require_editable(site, "before"), "before"), "before")
        self.call_qkv(site)
        self._put_before(site, Before(adapter, site.layout))

    def after(self, site: Site, adapter: nn.Module) -> None:
        """See `Edit.after`."""
        site = require_whole(require_editable(site, "after"), "after")
        holder = After(adapter, site.layout, site.part)
        self.call_qkv(site)
        self.add(holder, site, site)
        self.hook(site.exit.register_forward_hook(holder.leave, prepend=True))

    def _put_before(self, site: Site, holder: Before | Stream) -> None:
        self.add(holder, site, site)
        self.hook(site.enter.register_forward_pre_hook(holder.enter, with_kwargs=True))

    def stream(self, site: Site, adapter: nn.Module) -> None:
        """See `Edit.stream`."""
        site = require_stream(site, "stream")
        block = check_stream(self.model, self.sites, site)
        if block is not None:
            self._put_before(block, Before(adapter, block.layout))
            return
        let_readers_keep_copies(site.enter)
        self._put_before(site, Stream(adapter, site.layout))

    def around(self, given: Site | Sequence[Site], adapter: nn.Module) -> None:
        """See `Edit.around`."""
        sites = [require_editable(site, "around") for site in (given if isinstance(given, Sequence) else [given])]
        if not sites or len({site.enter for site in sites}) < len(sites):
            count = "one twice" if sites else "no site"
            raise AttachError(f"around was given {count}. Give one, or several that follow each other")
        for site in sites:
            require_all_channels(site, "around")
        self.call_qkv(*sites)
        links, num_items = links_of(self.model, self.sites, sites)
        first = links[0].module
        holder = Around(
            adapter,
            links,
            sites[0].layout,
            sites[-1].layout,
            self.state.holders,
            depth=1 + num_around(first),
        )
        self.add(holder, sites[0], *sites)
        for link, number in zip(links, num_items, strict=True):
            self.log.undo_steps.append(pass_on(link.module, number))
        self.hook(first.register_forward_pre_hook(holder.enter, with_kwargs=True))
        for module in dict.fromkeys(link.module for link in links):
            if module is not first:
                self.hook(module.register_forward_pre_hook(holder.refuse_alone))
            self.hook(module.register_forward_hook(holder.leave, always_call=True))

    def side(self, given: Sequence[Site | Attention], cell: nn.Module, *, leaving: bool) -> None:
        """See `Edit.side`."""
        given = given if isinstance(given, Sequence) else [given]
        sites = [item.site if isinstance(item, Attention) else item for item in given]
        sites = [require_whole(require_editable(site, "side"), "side") for site in sites]
        if not sites or len({site.exit for site in sites}) < len(sites):
            raise AttachError("side needs one site or more, each another module. Give the blocks that the cell reads")
        for site in sites:
            require_all_channels(site, "side")
        holder = Side(cell, tuple(site.layout for site in sites), reads_output=leaving)
        self.call_qkv(*sites)
        self.add(holder, sites[0], *sites)
        for index, site in enumerate(sites):
            step = SideStep(holder, index)
            item = given[index]
            if isinstance(item, Attention):
                self.log.undo_steps.append(step.read_attention(_one_module(site), item.head_dim).remove)
            elif not leaving:
                self.hook(site.enter.register_forward_pre_hook(step.enter, with_kwargs=True))
            self.hook(site.exit.register_forward_hook(step.leave, prepend=True, always_call=True))

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

    def add_keys_values(self, attention: Attention, adapter: nn.Module) -> None:
        """Let an adapter's keys and values be attended to; see `Edit.keys_values`.

        Raises:
            AttachError: The attention has such an adapter.
        """
        site = attention.site
        if any(h.enabled for h in self._keys_holders(site.enter)):
            raise AttachError(
                f"keys_values: {site.where} has keys and values of another adapter. Disable or detach that one first"
            )
        holder = KeysValues(adapter, site.enter, site.layout, (attention.head_dim, attention.v_head_dim))
        self.add(holder, site, site)
        self.log.enable_checks.append(lambda: self._refuse_other_keys(holder))
        holder.put()
        self.log.undo_steps.append(holder.remove)
        self._keep_from_fused_kernel(site.enter)

    def _keys_holders(self, attention: nn.Module) -> list[KeysValues]:
        """Return the adapters whose keys and values an attention attends to."""
        return [h for h in self.state.holders if isinstance(h, KeysValues) and h.hidden[0] is attention]

    def _keep_from_fused_kernel(self, module: nn.Module) -> None:
        """Give a module a hook while the attachment is enabled.

        torch's encoder layers call an attention only if something in them has one; a forward that is replaced does not
        count.
        """
        handles: list[RemovableHandle] = []

        def switch(on: bool) -> None:
            if on:
                handles.append(module.register_forward_pre_hook(_do_nothing))
            else:
                handles.pop().remove()

        self.toggle(switch, on=False)

    def _refuse_other_keys(self, holder: KeysValues) -> None:
        if any(h.enabled and h is not holder for h in self._keys_holders(holder.hidden[0])):
            raise AttachError(
                "another attachment adds keys and values to the same attention. Disable it first (attachment.disable())"
            )

    def call_qkv(self, *sites: Site) -> None:
        """Let an attention call its qkv layer if one of `sites` is that layer; see `call_qkv_within`."""
        edited = {id(site.enter) for site in sites}
        state, name = self.state, self.log.label
        for layers in state.projections.values():
            if any(id(layer) in edited for layer in layers.children()):
                self.toggle(lambda on, layers=layers: layers.use(name, on), on=False)  # type: ignore[misc]
        for attention in qkv_readers(self.model):
            if id(attention.qkv) in edited:
                self._call_qkv_of(attention)

    def call_qkv_within(self, site: Site) -> None:
        """Let the attentions inside a site call their qkv layers for as long as the attachment is enabled."""
        for attention in qkv_readers(site.enter):
            self._call_qkv_of(attention)

    def _call_qkv_of(self, attention: Any) -> None:
        state, name = self.state, self.log.label
        if attention.qkv_bias_separate is False or attention in state.qkv_users:
            self.toggle(lambda on: state.use_qkv_module(attention, name, on), on=False)

    def _host(self, site: Site) -> nn.Module:
        """Return the site's block for a block, else the module around the site; never a container of children."""
        if isinstance(site, Block):
            return host_for(site.exit)
        parent = self.model.get_submodule(site.exit_path.rpartition(".")[0])
        inside = isinstance(parent, CONTAINERS) and not isinstance(site.exit, CONTAINERS)
        return site.exit if inside else host_for(parent)

    def _weights(self, site: Site) -> Iterable[nn.Parameter]:
        """Yield the parameters at a site, then the model's; matrices first, because norms may have another dtype."""
        for module in (site.exit, self._host(site), self.model):
            yield from (p for p in module.parameters() if p.ndim > 1)
            yield from module.parameters()


def _one_module(site: Site) -> nn.Module:
    if site.is_module:
        return site.enter
    raise AttachError(f"keys and values can be read of an attention that is one module, but {site.where} is several")


def _do_nothing(module: nn.Module, args: Any) -> None:
    """Do nothing; a hook."""


def free_name(module: nn.Module, base: str) -> str:
    """Return a name that no attribute of a module has yet."""
    name, number = base, 1
    while hasattr(module, name):
        name, number = f"{base}_{number}", number + 1
    return name
