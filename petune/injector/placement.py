"""Put adapters and hooks into a model, and record them in the edit log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from petune.base.errors import AttachError
from petune.injector.attention import Attention
from petune.injector.chain import check_stream, links_of
from petune.injector.edit_log import EditLog, Placed
from petune.injector.hooks.around import Around, pass_on
from petune.injector.hooks.base import Before, Holder, idempotent
from petune.injector.hooks.keys_values import KeysValues
from petune.injector.hooks.prompts import order_hooks
from petune.injector.hooks.reading import Gather, Parallel
from petune.injector.hooks.side import Side, SideStep
from petune.injector.hooks.spanning import Spanning, spans_blocks
from petune.injector.hooks.stream import Stream, let_readers_keep_copies
from petune.injector.qkv import qkv_readers
from petune.injector.shared_modules import refuse_shared
from petune.injector.sparse import SparseParameters
from petune.injector.trainable import CONTAINERS, TrainableState, added_to, host_for
from petune.injector.zero_entries import ZeroEntries
from petune.sites.required import (
    require_all_channels,
    require_editable,
    require_readable,
    require_stream,
    require_whole,
)
from petune.sites.site import Block, Site, Sites


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
            AttachError: It would act in two blocks that share a module.
        """
        refuse_shared(self.sites, self._shared, passed[-1])
        host = self._host(near)
        role = "" if isinstance(near, Block) else f"_{near.role}"
        attribute = _free_name(host, f"petune_{self.log.label}{role}")
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
        holder.part = exit.part
        self.call_qkv(*enters, exit)
        self.add(holder, exit, *enters, exit)
        self._read(holder, enters, leaving=leaving)
        # the innermost hook, so that the output still has the tokens that ENTER saw; it runs after an exception too
        self.hook(exit.exit.register_forward_hook(holder.leave, prepend=True, always_call=True))

    def _reader(
        self, enters: Sequence[Site], exit: Site, adapter: nn.Module, *, leaving: bool, single: bool
    ) -> Parallel | Gather:
        layouts = tuple(site.layout for site in enters)
        reads = [site.exit if leaving else site.enter for site in enters]
        if spans_blocks(self.sites, reads, exit, leaving=leaving):
            return Spanning(adapter, layouts, exit.layout, single=single)
        return Parallel(adapter, layouts[0], exit.layout) if single else Gather(adapter, layouts, exit.layout)

    def _read(self, holder: Parallel | Gather, enters: Sequence[Site], *, leaving: bool) -> None:
        """Put in the hooks by which an adapter reads: what enters the sites, or what leaves them."""
        holder.between = all(site.read_only for site in enters)
        holder.reads_output = leaving
        holder.enter_parts = tuple(site.part for site in enters)
        for index, site in enumerate(enters):
            on_input, on_output = holder.enter, holder.read_output
            if index == 0 and isinstance(holder, Gather):
                on_input, on_output = holder.enter_first, holder.read_output_first
            if leaving:
                self.hook(site.exit.register_forward_hook(on_output, prepend=True))
            else:
                self.hook(site.enter.register_forward_pre_hook(on_input, with_kwargs=True))

    def stream(self, site: Site, adapter: nn.Module) -> None:
        """See `Edit.stream`."""
        site = require_stream(site, "stream")
        block = check_stream(self.model, self.sites, site)
        if block is not None:
            before = Before(adapter, block.layout)
            self.add(before, block, block)
            self.hook(block.enter.register_forward_pre_hook(before.enter, with_kwargs=True))
            return
        holder = Stream(adapter, site.layout)
        let_readers_keep_copies(site.enter)
        self.add(holder, site, site)
        self.hook(site.enter.register_forward_pre_hook(holder.enter, with_kwargs=True))

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
        holders = self.state.holders
        holder = Around(adapter, links, sites[0].layout, sites[-1].layout, holders)
        first = links[0].module
        block_of = {m: b.index for b in self.sites.all_blocks for root in b.own_modules for m in root.modules()}
        numbers = [block_of.get(link.module) for link in links]
        holder.num_repeated = next((i for i, number in enumerate(numbers) if number != numbers[0]), len(links))
        hooks = first._forward_pre_hooks.values()
        holder.depth = 1 + sum(isinstance(getattr(hook, "__self__", None), Around) for hook in hooks)
        self.add(holder, sites[0], *sites)
        for link, number in zip(links, num_items, strict=True):
            self.log.undo_steps.append(pass_on(link.module, number))
        self.hook(first.register_forward_pre_hook(holder.enter, with_kwargs=True))
        for module in dict.fromkeys(link.module for link in links):
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
        holder = Side(cell, tuple(site.layout for site in sites))
        holder.reads_output = leaving
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
            AttachError: The attention is no module of its own, or has such an adapter.
        """
        site = attention.site
        known = self.state.holders
        others = [h for h in known if isinstance(h, KeysValues) and h.hidden[0] is site.enter]
        if not site.is_module or any(h.enabled for h in others):
            reason = "has keys and values of another adapter" if site.is_module else "is several modules"
            raise AttachError(f"keys_values needs an attention that is one module of its own: {site.where} {reason}")
        holder = KeysValues(adapter, site.enter, site.layout, (attention.head_dim, attention.v_head_dim))
        self.add(holder, site, site)
        self.log.enable_checks.append(lambda: self._refuse_other_keys(holder))
        holder.put()
        self.log.undo_steps.append(holder.remove)
        self._keep_from_fused_kernel(site.enter)

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
        known = self.state.holders
        same = (h for h in known if isinstance(h, KeysValues) and h.hidden[0] is holder.hidden[0])
        if any(h.enabled and h is not holder for h in same):
            raise AttachError(
                "another attachment adds keys and values to the same attention. Disable it first (attachment.disable())"
            )

    def train_entries(self, parameters: Sequence[nn.Parameter], masks: Sequence[Tensor]) -> SparseParameters:
        """Let some entries of the backbone's parameters train; see `Edit.train`.

        Raises:
            AttachError: A mask does not fit, or another method trains a parameter.
        """
        owners = self._owners(parameters)
        self.refuse_trained(parameters, whole=False)
        entries = SparseParameters([(module, name) for _, module, name in owners], masks)
        host = host_for(self.model.get_submodule(_common([path for path, _, _ in owners])))
        attribute = _free_name(host, f"petune_{self.log.label}_entries")
        host.add_module(attribute, entries)
        self.log.undo_steps += [lambda: delattr(host, attribute), entries.undo]
        self.log.sparse.append(entries)
        self.log.added_parameters.append(entries.values)
        self.log.added_buffers.append((entries, "indices"))
        self.log.changes_all_rows = True
        self.log.toggles.append(idempotent(entries.set_enabled, on=True))
        self.log.merges.append(entries.merge)
        entries.watch(self.model)
        inner = (block.enter for block in self.sites.all_blocks)
        for module in dict.fromkeys((self.model, *inner)):
            handle = module.register_forward_pre_hook(entries.before_forward, prepend=True)
            self.log.undo_steps.append(handle.remove)
        return entries

    def keep_zero(self, masks: Mapping[nn.Parameter, Tensor]) -> None:
        """Keep the entries of added parameters at zero where their mask is False."""
        for parameter, mask in masks.items():
            zeros = ZeroEntries(parameter, mask)
            self.log.zeros.append(zeros)
            self.log.undo_steps.append(zeros.remove)
            self.log.undo_steps.append(self.model.register_forward_pre_hook(zeros.before_forward, prepend=True).remove)

    def refuse_trained(self, parameters: Sequence[nn.Parameter], *, whole: bool = True) -> None:
        """Check that no other method trains entries of these parameters, nor the parameters if only entries are to.

        Raises:
            AttachError: One does, and both may be enabled at once.
        """
        state = self.state
        if state.is_bank_loading:
            return
        others = {name: parts for name, parts in state.attachments.items() if name != self.log.label}
        own = {id(p) for entries in self.log.sparse for p in entries.targets}
        own |= set() if whole else {id(p) for p in self.log.unfrozen}
        for p in parameters:
            trained = (name for name, parts in others.items() if not whole and any(p is q for q in parts.parameters))
            name = self.log.label if id(p) in own else state.sparse_trainer_of(p) or next(trained, None)
            if name == self.log.label:
                raise AttachError(
                    f"{name} trains entries of {self._path_of(p)} twice, or entries and all of it. Train it once, "
                    "with one mask"
                )
            if name is not None:
                raise AttachError(
                    f"{self.log.label} and {name} would both train {self._path_of(p)}, one of them single entries of "
                    "it, and each would restore its own values of it when it is disabled. Detach the other one first, "
                    "or attach one of them to a copy of the model, or load both into an AdapterBank"
                )

    def _path_of(self, p: Tensor) -> str:
        return next(path for path, q in self.model.named_parameters() if q is p)

    def _owners(self, parameters: Sequence[nn.Parameter]) -> list[tuple[str, nn.Module, str]]:
        """Return path, module and name of each parameter of the model.

        Raises:
            AttachError: It is none, is given twice, or is quantized.
        """
        found: dict[int, tuple[str, nn.Module, str]] = {}
        for path, module in self.model.named_modules():
            for name, p in module._parameters.items():
                found.setdefault(id(p), (path, module, name))
        added = added_to(self.model)
        for number, p in enumerate(parameters):
            is_new = isinstance(p, Tensor) and (id(p) in added or any(p is q for q in parameters[:number]))
            if not isinstance(p, nn.Parameter) or id(p) not in found or is_new or not p.is_floating_point():
                raise AttachError(
                    f"edit.train with a mask takes floating-point parameters of the backbone, each once; number "
                    f"{number} is a {type(p).__name__} that is none, or was given before. Take them from edit.model"
                )
        if not parameters:
            raise AttachError("edit.train with a mask was given no parameter. Take them from edit.model")
        return [found[id(p)] for p in parameters]

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


def _common(paths: Sequence[str]) -> str:
    """Return the path of the innermost module that holds all of these modules."""
    parts = [path.split(".") for path in paths]
    same = [names[0] for names in zip(*parts, strict=False) if len({*names}) == 1]
    depth = next((i for i, names in enumerate(zip(*parts, strict=False)) if len({*names}) > 1), len(same))
    return ".".join(same[:depth])


def _free_name(module: nn.Module, base: str) -> str:
    name, number = base, 1
    while hasattr(module, name):
        name, number = f"{base}_{number}", number + 1
    return name
