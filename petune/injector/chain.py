"""Watch one forward for how modules follow each other: what a verb needs to know before it surrounds or replaces."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.injector.hooks.around import Link
from petune.injector.hooks.base import is_tuple
from petune.sites.forward import dry_forward, tensors_in
from petune.sites.hooked import removed_after
from petune.sites.input_spec import InputSpec
from petune.sites.layouts import share_memory
from petune.sites.site import Block, Site
from petune.sites.sites import Sites


@dataclass(eq=False)
class Called:
    """The first call of a module, with all tensors, so that identity means something.

    Attributes:
        module: The module.
        start: Its position among the calls.
        args: What it was called with, without keywords.
        kwargs: The keywords.
        stop: How many calls had begun when it ended.
        output: What it returned.
        count: How often the forward called the module.
    """

    module: nn.Module
    start: int
    args: Any
    kwargs: Any
    stop: int = 0
    output: Any = None
    count: int = 0

    @property
    def inputs(self) -> list[Tensor]:
        """All tensors that it was called with."""
        return [*tensors_in((self.args, self.kwargs))]

    @property
    def returned(self) -> Tensor | None:
        """The tensor that it returned; of a tuple, the first item."""
        first = self.output[0] if is_tuple(self.output) and self.output else self.output
        return first if isinstance(first, Tensor) else None

    @property
    def num_items(self) -> int | None:
        """The number of items that it returned; None for a tensor."""
        return len(self.output) if is_tuple(self.output) else None


def calls_of(model: nn.Module, spec: InputSpec, modules: Iterable[nn.Module]) -> dict[nn.Module, Called]:
    """Return the first call of each of `modules` in a forward, as the model's own code made it."""
    calls: dict[nn.Module, Called] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module not in calls:
            calls[module] = Called(module, len(calls), args, kwargs)
        calls[module].count += 1

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if not calls[module].stop:
            calls[module].stop, calls[module].output = len(calls), output

    watched = dict.fromkeys(modules)
    handles = [m.register_forward_pre_hook(enter, with_kwargs=True, prepend=True) for m in watched]
    handles += [m.register_forward_hook(leave) for m in watched]
    with removed_after(handles):
        dry_forward(model, spec)
    return calls


def links_of(model: nn.Module, sites: Sites, given: Sequence[Site]) -> tuple[tuple[Link, ...], tuple[int | None, ...]]:
    """Return the modules from the first to the last of some sites, and how many items each returns.

    Raises:
        AttachError: They are not called one after another, each with exactly what the one before has returned.
    """
    first, last = given[0], given[-1]
    calls = calls_of(model, sites.input_spec, model.modules())
    chain = [call for call in [calls.get(first.enter)] if call is not None]
    while chain and chain[-1].module is not last.exit:
        following = _following(chain[-1], calls, last.exit)
        chain = [*chain, following] if following is not None else []
    passed = {call.module for call in chain}
    if not chain or any(site.exit not in passed for site in given):
        where = first.where if len(given) == 1 else f"{first.path} … {last.exit_path}"
        raise AttachError(
            f"{sites.model} computes something between the modules of {where} in its own code, so no adapter can be "
            "around all of them. Use another method on this model; in a method of your own, a smaller site, or "
            "parallel, before and after"
        )
    for call in chain:
        _check_can_pass_on(call, chain[0], sites)
    links = tuple(Link(call.module, takes_further=_further(call) != []) for call in chain)
    return links, tuple(call.num_items for call in chain)


def _following(call: Called, calls: dict[nn.Module, Called], last: nn.Module) -> Called | None:
    """Return the outermost call on what a call has returned, or that of the last module."""
    out = call.returned
    users = [c for c in calls.values() if c.start >= call.stop and c.inputs and c.inputs[0] is out]
    at_end = [c for c in users if c.module is last]
    around_end = {m for c in users if last in {*c.module.modules()} for m in [c.module]}
    return next(iter([*at_end, *(c for c in users if c.module not in around_end)]), None)


def _further(call: Called) -> list[Any]:
    return [*call.args[1:], *([*call.kwargs.values()][0 if call.args else 1 :])]


def _check_can_pass_on(call: Called, first: Called, sites: Sites) -> None:
    """Check that a module can be called again by an adapter, and can be told to pass on.

    Raises:
        AttachError: It takes tensors that the first one does not take, or returns something else than a tensor.
    """
    name = type(call.module).__name__
    if call.returned is None:
        raise AttachError(
            f"no adapter can be around {name} of {sites.model}, which returns no tensor. Use another method on this "
            "model; in a method of your own, another site"
        )
    own = [x for value in _further(call) for x in tensors_in(value)]
    shared = (
        [x for value in _further(first) for x in tensors_in(value)] if type(call.module) is type(first.module) else []
    )
    takes_tensors = any(all(x is not y for y in [*shared, *call.inputs[:1]]) for x in own)
    values = _other_values(call)
    same_values = _other_values(first) if type(call.module) is type(first.module) else {}
    if call is not first and (takes_tensors or values != same_values):
        further = "further tensors of its own, such as a mask" if takes_tensors else ", ".join(values or same_values)
        raise AttachError(
            f"no adapter can be around {name} of {sites.model} and modules before it, because it takes {further}, "
            "which these do not. Use another method on this model; in a method of your own, single sites"
        )


def _other_values(call: Called) -> dict[str, Any]:
    """Return by name the further arguments that are neither tensors nor what the forward takes by default."""
    try:
        bound = inspect.signature(type(call.module).forward).bind(call.module, *call.args, **call.kwargs)
    except (TypeError, ValueError):  # a forward in C, or one that was replaced
        return {}
    defaults = {name: parameter.default for name, parameter in bound.signature.parameters.items()}
    given = [*bound.arguments.items()][2:]  # the module itself, and what flows through it
    plain = {name: value for name, value in given if value is not None and not [*tensors_in(value)]}
    return {name: value for name, value in plain.items() if value is not defaults[name] and value != defaults[name]}


def check_stream(model: nn.Module, sites: Sites, site: Site) -> Block | None:
    """Return the block whose input a stream is, if attention and MLP read one tensor; None for a tensor of its own.

    Raises:
        AttachError: Several blocks share the module that the stream enters, one calls it twice, or what enters the
            block cannot be replaced.
    """
    block = next(b for b in sites.all_blocks if any(part is site for part in b.parts.values()))
    shared = [b for b in sites.all_blocks if b is not block and "mid" in b.parts and b.mid.enter is site.enter]
    if shared:
        raise AttachError(
            f"two blocks of {sites.model} share {site.path}. An adapter at the stream of one would act in both. "
            "Use a method that edits the layers inside, such as lora"
        )
    calls = calls_of(model, sites.input_spec, [block.enter, site.enter])
    if block.enter not in calls or site.enter not in calls:
        raise AttachError(f"the forward of {sites.model} does not call {site.path}. Use another method on this model")
    if calls[site.enter].count > calls[block.enter].count:
        raise AttachError(
            f"{sites.model} calls {site.path} elsewhere, too, so an adapter for the stream at {site.where} would act "
            "at several tensors. Use a method that reads the stream, such as adaptformer, or edits the layers inside"
        )
    stream = calls[site.enter].inputs[0]
    if not any(share_memory(stream, x) for x in calls[block.enter].inputs):
        return None
    if block.enter is site.enter or not block.is_module:
        raise AttachError(
            f"the stream at {site.where} of {sites.model} is what enters block {block.index}, which is no module of "
            "its own. Use another method on this model"
        )
    return block
