"""Check with one forward that a method does something: every adapter is called, and a gradient can reach it."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from petune.base.errors import DeadSite
from petune.base.text import shortened
from petune.injector.attachment import Attachment
from petune.injector.edit_log import EditLog
from petune.injector.hooks.base import Holder
from petune.injector.own_backward import check_backward, own_functions
from petune.injector.unreached import unreached_layers, warn_of_unreached
from petune.injector.unread_tokens import Rows, last_blocks, layers_of_unread_tokens, rows_entering
from petune.sites.forward import NUM_ON_META, device_of, dtype_of, inference
from petune.sites.hooked import removed_after
from petune.sites.random_numbers import is_large
from petune.sites.recorder import record_calls
from petune.sites.returned import tensors_returned
from petune.sites.routed import routed_modules, unchosen_modules
from petune.sites.site import Block, Site, is_within, modules_of
from petune.sites.sites import Sites
from petune.sites.undisturbed import undisturbed, without_adapters
from petune.sites.used_parameters import leaves_of, reached_on_meta

LOG = logging.getLogger(__name__)

_CHECKED: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()
"""For each model, the edits for which a forward pass used every adapter."""
MAX_SHOWN = 4


@dataclass(frozen=True)
class _Graph:
    """The facts that one forward with gradients gives.

    Attributes:
        called: The watched modules that it called.
        with_gradient: Those of them that it called while gradients were enabled.
        leaves: Identities of the parameters that the output depends on; None if gradient checkpointing hides some.
        has_own_backward: True if the model computes a part of its gradients by a function of its own.
        rows: How many tokens entered each layer of the last blocks, for one image.
    """

    called: set[nn.Module]
    with_gradient: set[nn.Module]
    leaves: set[int] | None
    has_own_backward: bool = False
    rows: Rows = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """Some of what a method trains; it learns if a gradient reaches one of its parameters.

    Attributes:
        where: Path, for messages.
        blocks: The blocks that it is in, if any.
        parameters: What trains.
    """

    where: str
    blocks: tuple[Block, ...]
    parameters: tuple[nn.Parameter, ...]


def check_used(attachment: Attachment, holders: Iterable[Holder], *, advises: bool) -> None:
    """Check with one forward that every adapter is called, and that the output depends on it.

    The same method with the same options at the same blocks and sites, among the same others, is checked once per
    model. A forward that has changed since then is not noticed.

    Args:
        attachment: The new one.
        holders: All adapters in the model.
        advises: Warn of what trains where no forward was seen to use it.

    Raises:
        DeadSite: An adapter is not called, or no gradient reaches it.
    """
    model, sites, log = attachment.model, attachment.sites, attachment.edit_log
    key = (advises, *_checked_as(attachment, holders))
    if key in _CHECKED.get(model, ()):
        return
    adapters = [holder.adapter for holder, _ in log.placed]
    last = last_blocks(attachment)
    graph = _graph_on_meta(attachment, adapters, last) if is_large(model) else None
    graph = graph or _graph(model, sites, adapters, last)
    called = graph.called if graph is not None else set(record_calls(model, sites.input_spec, adapters))
    is_partly_called = not called.issuperset(adapters)
    if is_partly_called:  # experts that black images do not reach
        routed = routed_modules(model, sites.input_spec, sites.block_modules()).keys()
        called |= routed
        if graph is not None and graph.leaves is not None:
            graph.leaves.update(id(p) for m in routed for p in m.parameters())
    _check_called(log, sites, called)
    if graph is not None:
        _check_reached(attachment, graph, advises=advises)
        if graph.has_own_backward:
            check_backward(attachment)
        elif advises and graph.leaves is not None:
            warn_of_unreached(attachment, layers_of_unread_tokens(attachment, graph.leaves, graph.rows))
    if advises:
        _warn_of_unchosen(attachment, graph, is_partly_called)
    _CHECKED.setdefault(model, set()).add(key)


def _checked_as(attachment: Attachment, holders: Iterable[Holder]) -> tuple[Any, ...]:
    """Return what decides the result of the check: method, options, input, blocks, sites, and the other adapters."""
    sites, tuner = attachment.sites, attachment.tuner
    # "partial" and PEFT's methods place no adapter; what a module was replaced by has to be checked
    blocks = [_ends_of([block, *block.inner_sites]) for block in sites.blocks]
    places = [(type(holder), *_ends_of(passed)) for holder, passed in attachment.edit_log.placed]
    others = [(type(h), type(h.adapter), h.passed) for h in holders if h.enabled]
    return (type(tuner), tuner.config.model_dump_json(), sites.input_spec.key, *blocks, *places, *others)


def _ends_of(sites: Iterable[Site]) -> tuple[Any, ...]:
    """Return references to the modules that bound some sites; unlike identities, these are not reused."""
    return tuple((weakref.ref(site.enter), weakref.ref(site.exit)) for site in sites)


def _warn_of_unchosen(attachment: Attachment, graph: _Graph | None, is_partly_called: bool) -> None:
    """Warn of what a method trains in modules that seem to be experts, but that no input was seen to choose."""
    model, sites, leaves = attachment.model, attachment.sites, None if graph is None else graph.leaves
    if not is_partly_called and (leaves is None or all(id(p) in leaves for p in attachment.tuned.values())):
        return
    with without_adapters(model):  # else a method that is no identity at the start would reach other experts
        unchosen = unchosen_modules(model, sites.input_spec, sites.block_modules())
    trained = {id(p) for p in attachment.tuned.values()}
    within = {path for path, m in model.named_modules() if m in unchosen and trained & {id(p) for p in m.parameters()}}
    where = sorted(path for path in within if path.rpartition(".")[0] not in within)
    if where:
        shown = shortened(where, MAX_SHOWN)
        warnings.warn(
            f"{attachment.name} also trains {shown} of {sites.model}, which no forward called, neither of black images "
            "nor of noise. If no other image chooses them, as a router chooses experts, nothing is learned there",
            stacklevel=5,
        )


def _check_called(log: EditLog, sites: Sites, called: set[nn.Module]) -> None:
    for holder, passed in log.placed:
        if holder.adapter not in called:
            where = " or ".join(dict.fromkeys(site.where for site in passed))
            raise DeadSite(
                f"{log.label} would do nothing: the forward of {sites.model} never calls {where} (it may read the "
                "weights without calling the module). Use another method on this model"
            )


def _graph(
    model: nn.Module,
    sites: Sites,
    adapters: Iterable[nn.Module],
    last: Iterable[Block] = (),
    *,
    training: bool = False,
) -> _Graph | None:
    """Run a forward of black images with gradients; None if the model does not run like that.

    Nothing is kept for a backward, so it takes no more memory than a forward without gradients.

    Args:
        model: Modes, buffers and random states are as before afterwards.
        sites: The model's; its blocks are watched.
        adapters: Modules to watch.
        last: Blocks whose layers to watch.
        training: Run in train mode, with what is frozen in eval mode, as in training.
    """
    kept = undisturbed(model, math.inf) if training else contextlib.nullcontext()
    saved = torch.autograd.graph.saved_tensors_hooks(_drop, _drop)
    try:
        num_images = 2 if training else 1  # BatchNorm in train mode wants two
        watched = _calls(adapters, sites), rows_entering(model, last, num_images)
        with watched[0] as calls, watched[1] as rows, kept, inference(model), torch.enable_grad(), saved:
            if training:
                model.train()
            images = sites.input_spec.zeros(num_images)
            outputs = [*tensors_returned(images.to(device_of(model), dtype_of(model)).call(model))]
            leaves, has_own_backward = leaves_of(outputs), bool(own_functions(outputs))
    except Exception:  # an operation without a gradient, inference tensors, a train mode that wants targets
        LOG.debug("no forward with gradients, training=%s: what gets one is not checked", training, exc_info=True)
        return None
    return _Graph(*calls, leaves, has_own_backward, rows)


def _graph_on_meta(attachment: Attachment, adapters: Iterable[nn.Module], last: Iterable[Block]) -> _Graph | None:
    """Return the same without computing anything: shapes suffice. None if the model does not run on the meta device."""
    model, sites = attachment.model, attachment.sites
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        watched = _calls(adapters, sites), rows_entering(model, last, NUM_ON_META)
        with watched[0] as calls, watched[1] as rows, undisturbed(model), torch.enable_grad():
            leaves, _ = reached_on_meta(model, sites.input_spec, trained, [])
    except Exception:  # see `petune.sites.forward.dry_forward`
        LOG.debug("no gradients on the meta device; a real forward follows", exc_info=True)
        return None
    return _Graph(*calls, leaves, rows=rows)


@contextlib.contextmanager
def _calls(adapters: Iterable[nn.Module], sites: Sites) -> Iterator[tuple[set[nn.Module], set[nn.Module]]]:
    """Collect the adapters and blocks that are called, and those of them that are with gradients enabled."""
    called: set[nn.Module] = set()
    with_gradient: set[nn.Module] = set()

    def enter(module: nn.Module, args: Any) -> None:
        called.add(module)
        if torch.is_grad_enabled():
            with_gradient.add(module)

    watched = dict.fromkeys([*adapters, *(block.enter for block in sites.blocks)])
    handles = [module.register_forward_pre_hook(enter) for module in watched]
    with removed_after(handles):
        yield called, with_gradient


def _drop(value: Any) -> Any:
    """Keep nothing for a backward that never comes."""


def _check_reached(attachment: Attachment, graph: _Graph, *, advises: bool) -> None:
    """Refuse a method of which parts get no gradient, in eval mode and in train mode.

    Raises:
        DeadSite: There are such parts.
    """
    if graph.leaves is not None:  # the backbone computes with its own weights, of which some entries train
        reached = (e for e in attachment.edit_log.sparse if any(id(p) in graph.leaves for p in e.targets))
        graph.leaves.update(id(entries.values) for entries in reached)
    if graph.leaves is None or all(id(p) in graph.leaves for p in attachment.tuned.values()):
        return
    parts = _parts(attachment)
    dead = _unreached(parts, graph.leaves)
    if not dead:
        if advises and not _warn_of_idle_tower(attachment, graph):
            _warn_of_unreached(attachment, graph)
        return
    trained = _graph(attachment.model, attachment.sites, (), training=True)
    if trained is not None:
        dead = [] if trained.leaves is None else _unreached(dead, trained.leaves)
    if not dead:
        return
    message = _message(attachment, dead, graph, parts)
    if trained is None:  # it may return other things in training, such as a loss
        warnings.warn(f"{message} in eval mode. After a first backward, call its check_gradients()", stacklevel=5)
    else:
        raise DeadSite(f"{message}. {_advice(attachment, dead, graph)}")


def _parts(attachment: Attachment) -> list[_Part]:
    """Return what the method trains: each adapter; by block, what a tuner added by hand; the backbone's own."""
    log, sites = attachment.edit_log, attachment.sites
    owners = {module: (block,) for block in reversed(sites.blocks) for module in modules_of([block])}
    adapters = [
        _Part(
            passed[-1].where, owners.get(passed[-1].exit, ()), tuple(p for p in holder.parameters() if p.requires_grad)
        )
        for holder, passed in log.placed
    ]
    placed = {id(p) for part in adapters for p in part.parameters}
    unfrozen = {id(p) for p in log.unfrozen}
    by_hand = {key: p for key, p in attachment.tuned.items() if id(p) not in placed | unfrozen}
    own = _by_block(sites, {key: p for key, p in attachment.tuned.items() if id(p) in unfrozen})
    return [*(part for part in adapters if part.parameters), *_by_block(sites, by_hand), *_as_one(own)]


def _by_block(sites: Sites, parameters: dict[str, nn.Parameter]) -> list[_Part]:
    groups: dict[Block | None, dict[str, nn.Parameter]] = {}
    for key, p in parameters.items():
        paths = ((b, path) for b in sites.blocks for path, _ in b.named_modules)
        block = next((b for b, path in paths if is_within(key, path)), None)
        groups.setdefault(block, {})[key] = p
    return [_Part(b.where if b else next(iter(g)), (b,) if b else (), tuple(g.values())) for b, g in groups.items()]


def _as_one(parts: list[_Part]) -> list[_Part]:
    """Return the backbone's own parameters as one part: it may own some that it never uses, but not only such.

    If some are in blocks, the others do not count: a final norm does not make up for blocks.
    """
    parts = [part for part in parts if part.blocks] or parts
    if not parts:
        return []
    blocks = tuple(block for part in parts for block in part.blocks)
    return [_Part(parts[0].where, blocks, tuple(p for part in parts for p in part.parameters))]


def _unreached(parts: list[_Part], leaves: set[int]) -> list[_Part]:
    return [part for part in parts if not any(id(p) in leaves for p in part.parameters)]


def _warn_of_unreached(attachment: Attachment, graph: _Graph) -> None:
    """Warn of layers where the method has no effect, in eval mode and in train mode."""
    paths = unreached_layers(attachment, graph.leaves or set())
    trained = _graph(attachment.model, attachment.sites, (), training=True) if paths else None
    if trained is not None and trained.leaves is not None:
        paths = unreached_layers(attachment, trained.leaves | (graph.leaves or set()))
    warn_of_unreached(attachment, paths)


def _message(attachment: Attachment, dead: list[_Part], graph: _Graph, parts: Sequence[_Part] = ()) -> str:
    """Return what is dead: whole blocks, or single parts of blocks in which others of all `parts` are not."""
    alive = {block for part in parts if part not in dead for block in part.blocks}
    blocks = dict.fromkeys(block for part in dead for block in part.blocks)
    single = dict.fromkeys(part.where for part in dead if alive.issuperset(part.blocks))
    paths = [*(b.where for b in blocks if b not in alive), *single]
    shown = shortened(paths, MAX_SHOWN)
    hidden = bool(blocks) and not any(block.enter in graph.with_gradient for block in blocks)
    reason = "the forward runs it under torch.no_grad()" if hidden else "the output does not depend on it"
    return f"{attachment.name} would learn nothing at {shown} of {attachment.sites.model}: {reason}"


def _warn_of_idle_tower(attachment: Attachment, graph: _Graph) -> bool:
    """Warn if a method trains the backbone's own parameters, and those of one of several towers get no gradient.

    Returns:
        True if it has warned.
    """
    has_warned = False
    towers, unfrozen = attachment.sites.towers, {id(p) for p in attachment.edit_log.unfrozen}
    for tower in towers if len(towers) > 1 else ():
        trained = [p for block in tower.blocks for m in block.own_modules for p in m.parameters() if id(p) in unfrozen]
        if trained and not any(id(p) in (graph.leaves or ()) for p in trained):
            part = _Part(tower.blocks[-1].where, tower.blocks, tuple(trained))
            warnings.warn(f"{_message(attachment, [part], graph)}. {_advice(attachment, [part], graph)}", stacklevel=6)
            has_warned = True
    return has_warned


def _advice(attachment: Attachment, dead: list[_Part], graph: _Graph) -> str:
    """Return what helps: the blocks that a gradient reaches, if there are others."""
    without = {block.index for part in dead for block in part.blocks}
    given = attachment.sites.given.blocks
    others = [b.index for b in given if b.index not in without and b.enter in graph.with_gradient]
    if others and all(part.blocks for part in dead):
        alive = {block for part in _parts(attachment) if part not in dead for block in part.blocks}
        if any(not alive.isdisjoint(part.blocks) for part in dead):
            return f"Leave its block out with blocks={others}, use lora, which warns of it, or let the model use it"
        return f"Leave it out with blocks={others}, or let the model use it"
    return "Use linear, which trains the head alone; or attach to the part from whose output you compute a loss"
