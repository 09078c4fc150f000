"""Find single layers inside a site: which linear layers the forward calls there, and with what."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from petune.base.errors import SiteNotFound
from petune.injector.hooks.base import Holder
from petune.injector.qkv import qkv_called
from petune.injector.shared_modules import refuse_shared_with_left_out
from petune.injector.trainable import added_to
from petune.injector.transposed_linear import is_transposed_linear
from petune.sites.layouts import is_pointwise
from petune.sites.recorder import record_calls
from petune.sites.routed import routed_modules
from petune.sites.site import Site, modules_of
from petune.sites.sites import Sites
from petune.sites.trace import Call
from petune.sites.used_parameters import used_parameters


class LayerFinder:
    """Answers questions about the backbone's layers, from one recorded forward.

    Attributes:
        others: Identities of the tensors that other attachments have added.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.model = model
        self.sites = sites
        self.others = added_to(model)
        self._shared = sites.shared_with_left_out()
        self._recorded: dict[nn.Module, Call] | None = None
        self._earlier: set[nn.Module] | None = None

    def linear_layers(self, site: Site, *, pointwise: bool, transposed: bool = False) -> tuple[Site, ...]:
        """See `Edit.linear_layers`."""

        def is_wanted(module: nn.Module) -> bool:
            return transposed if is_transposed_linear(module) else pointwise or isinstance(module, nn.Linear)

        inside = {m for module in site.modules for m in module.modules() if _is_matrix(m) and is_wanted(m)}
        refuse_shared_with_left_out(self.sites, self._shared, inside, site)
        calls = self._calls()
        first, last = calls.get(site.enter), calls.get(site.exit)
        if first is None or last is None or self.sites.first_owner(site) is not None:
            return ()

        def within(module: nn.Module) -> bool:
            call = calls.get(module)
            return call is not None and first.start <= call.start and call.stop <= last.stop

        layers = [m for m in self._matrices() if within(m) and is_wanted(m)]
        return tuple(self.site(m) for m in sorted(layers, key=lambda m: calls[m].start))

    def input_linears(self, site: Site) -> tuple[Site, ...]:
        """See `Edit.input_linears`."""
        calls = self._calls()
        layers = self.linear_layers(site, pointwise=False)
        return tuple(layer for layer in layers if calls[layer.enter].input is calls[site.enter].input)

    def uncalled_linears(self, site: Site) -> tuple[Site, ...]:
        """See `Edit.uncalled_linears`."""
        calls = self._calls()
        inside = {id(m) for module in site.modules for m in module.modules()}
        candidates = [m for m in self._matrices() if isinstance(m, nn.Linear)]
        return tuple(self.site(m) for m in candidates if id(m) in inside and m not in calls)

    def called(self, modules: Iterable[nn.Module]) -> set[nn.Module]:
        """See `Edit.called`."""
        candidates = list(modules)
        return set(record_calls(self.model, self.sites.input_spec, candidates)) if candidates else set()

    def used(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """See `Edit.used`."""
        candidates = list(parameters)
        used = {id(p) for p in used_parameters(self.model, self.sites.input_spec, candidates)}
        if len(used) < len(candidates):
            used |= {id(p) for m in self._routed() for p in m.parameters(recurse=False)}
        return [p for p in candidates if id(p) in used]

    def routed(self, modules: Iterable[nn.Module]) -> set[nn.Module]:
        """See `Edit.routed`."""
        return self._routed().keys() & {*modules}

    def backbone(self) -> list[nn.Module]:
        """See `Edit.backbone`."""
        head = self.sites.head_modules()
        left_out = self.sites.left_out_modules() | self._before_chosen()
        within = {id(m) for m in self.model.get_submodule(self.sites.within).modules()}

        in_adapters = {m for holder in self.model.modules() if isinstance(holder, Holder) for m in holder.modules()}

        def is_own(module: nn.Module) -> bool:
            added = module in in_adapters or any(id(p) in self.others for p in module.parameters(recurse=False))
            return id(module) in within and module not in head and module not in left_out and not added

        return [m for m in self.model.modules() if is_own(m)]

    def site(self, module: nn.Module, dim: int | None = None) -> Site:
        """See `Edit.site`."""
        for name, candidate in self.model.named_modules():
            if candidate is module:
                path = name.removesuffix(".base_layer")  # PEFT may have put a layer of its own around it
                width = dim if dim is not None else next((p.shape[-1] for p in module.parameters()), 0)
                ends: dict[str, Any] = {"path": path, "enter": module, "exit_path": path, "exit": module}
                return Site(role=path.rsplit(".", 1)[-1], dim=width, layout="BNC", model=self.sites.model, **ends)
        raise SiteNotFound(
            f"the {type(module).__name__} to edit is not a part of {self.sites.model}. Take modules from edit.model"
        )

    def forget(self) -> None:
        """Drop the recorded forward, which holds every activation of one image."""
        self._recorded = self._earlier = None

    def _before_chosen(self) -> set[nn.Module]:
        """Return the modules that run before the blocks that the option `blocks` chose, if it leaves out the first.

        If they trained, gradients would go through the blocks below that were left out.
        """
        given = self.sites.given.blocks
        if self.sites.chosen_from is None or self.sites.blocks[0].index == given[0].index:
            return set()
        if self._earlier is None:
            calls = record_calls(self.model, self.sites.input_spec, self.model.modules())
            start = calls[self.sites.blocks[0].enter].start
            self._earlier = {m for m, call in calls.items() if call.stop < start} - modules_of(self.sites.blocks)
        return self._earlier

    def _matrices(self) -> list[nn.Module]:
        return [m for m in self.backbone() if _is_matrix(m)]

    def _calls(self) -> dict[nn.Module, Call]:
        """Return the calls of one forward in which attentions call their qkv layers, as the verbs would let them."""
        if self._recorded is None:
            inner = [site for b in self.sites.blocks for site in b.inner_sites if not site.read_only]
            sites = [*self.sites.blocks, *inner]
            watched = [*self._matrices(), *(m for s in sites for m in s.modules)]
            with qkv_called(self.model):
                self._recorded = record_calls(self.model, self.sites.input_spec, watched)
            inside = {id(m) for b in self.sites.blocks for own in b.own_modules for m in own.modules()}
            if any(id(m) in inside and m not in self._recorded for m in self._matrices()):
                routed = {m: like for m, like in self._routed().items() if like in self._recorded}
                self._recorded |= {m: self._recorded[like] for m, like in routed.items()}
        return self._recorded

    def _routed(self) -> dict[nn.Module, nn.Module]:
        return routed_modules(self.model, self.sites.input_spec, self.sites.block_modules())


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_pointwise(module) or is_transposed_linear(module)
