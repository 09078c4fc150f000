"""Advise who attaches a method: what stays frozen next to what trains, and what training changes besides."""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Set

from torch import nn

from petune.base.text import plural, shortened
from petune.injector.attachment import Attachment
from petune.injector.hooks.base import After, Before
from petune.injector.hooks.reading import Gather, Parallel
from petune.injector.hooks.side import Side
from petune.injector.keys import named_parameters
from petune.injector.outside_head import parameters_outside
from petune.injector.unfrozen import warn_of_trained_though_frozen
from petune.sites.heads_by_library import classifiers_of
from petune.sites.new_weights import new_weights
from petune.sites.recorder import record_calls
from petune.sites.site import Block, is_within, modules_in, modules_of
from petune.sites.sites import Sites
from petune.sites.used_parameters import used_parameters

MAX_SHOWN = 6
MAX_MLPS = 4


def warn_of_layers_before_head(model: nn.Module, sites: Sites, train_head: bool) -> None:
    """Warn of what the predictions depend on and no head has, in a model that does not say which weights are new."""
    if not train_head or "head" not in sites.parts or new_weights(model).is_known:
        return  # what a checkpoint has filled may stay frozen; the rest is a head
    layers = _used_layers(model, sites)
    named = classifiers_of(model)
    # of several predictors, some may have been forgotten
    is_known = named is not None and len(named) < 2 and sites.num_outputs < 2
    others = [] if is_known else parameters_outside(model, sites)
    layers += [key for key in others if not any(_is_same(key, layer) for layer in layers)]
    if not layers:
        return
    warnings.warn(
        f"the head of {sites.model} is {sites.head.where}. Further layers that the predictions depend on count as "
        f"backbone and stay frozen unless the method trains them: {', '.join(layers)}. If they are new, name all "
        f'modules that train: head=["…", "…"]{_advice_for_bare(model, layers, len(layers))}',
        stacklevel=5,
    )


def _advice_for_bare(model: nn.Module, paths: Sequence[str], most: int) -> str:
    """Return how to name those of some paths that are single parameters, at most `most`; empty without any."""
    keys = {key for key, _ in model.named_parameters()}
    alone = [path for path in paths if path in keys]
    return f". Put {shortened(alone, most)} into a module to name it: a head is a module" if alone else ""


def _used_layers(model: nn.Module, sites: Sites) -> list[str]:
    if not sites.layers_before_head:
        return []
    parameters = {path: list(model.get_submodule(path).parameters()) for path in sites.layers_before_head}
    floating = [p for layer in parameters.values() for p in layer if p.is_floating_point()]
    used = {id(p) for p in used_parameters(model, sites.input_spec, floating)}
    called = _called_on_tokens(model, sites)
    return [path for path, layer in parameters.items() if path in called or any(id(p) in used for p in layer)]


def _called_on_tokens(model: nn.Module, sites: Sites) -> set[str]:
    """Return those of the layers before the head that return more than a row for each image, which a pooler does.

    D-FINE detaches what such a layer returns, and trains it by a loss of its own.
    """
    layers = {path: set(model.get_submodule(path).modules()) for path in sites.layers_before_head}
    calls = record_calls(model, sites.input_spec, {m for inside in layers.values() for m in inside})
    on_tokens = {m for m, call in calls.items() if call.output is not None and call.output.ndim > 2}
    return {path for path, inside in layers.items() if inside & on_tokens}


def _is_same(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def advise(attachment: Attachment) -> None:
    """Warn of what a method leaves as it is, or changes besides, although its user may not expect that."""
    _warn_of_shared_head(attachment)
    _warn_of_fixed(attachment)
    trained = {id(p) for p in (*attachment.tensors.with_gradients(), *attachment.head.values())}
    warn_of_trained_though_frozen(attachment.model, attachment.sites, attachment.name, trained)
    _warn_of_layers_outside_blocks(attachment)
    _warn_of_further_norms(attachment)
    _warn_of_norms_between(attachment)
    _warn_of_unadapted_mlps(attachment)


def _warn_of_fixed(attachment: Attachment) -> None:
    """Warn of what a method names, and leaves frozen because the model's author has fixed it."""
    left = {id(p) for p in attachment.edit_log.left_fixed}
    keys = [key for key, p in named_parameters(attachment.model).items() if id(p) in left]
    if keys:
        warnings.warn(
            f"{attachment.name} leaves {plural(len(keys), 'parameter')} of {attachment.sites.model} frozen "
            f"({shortened(keys, MAX_SHOWN)}), which had requires_grad=False among others that train, as fixed "
            "positions and masks have. To train them, call requires_grad_(True) on them before attaching",
            stacklevel=4,
        )


def _warn_of_shared_head(attachment: Attachment) -> None:
    """Warn if a head that trains shares tensors with a block or an embedding: training it changes that, too."""
    model, sites = attachment.model, attachment.sites
    in_head = {id(p): key for key, p in attachment.head.items()}
    own = {m for module in attachment.tensors.head_modules for m in module.modules()}
    keys = {m: [in_head[id(p)] for p in m._parameters.values() if id(p) in in_head] for m in {*model.modules()} - own}
    sharing = {m for m, shared in keys.items() if shared}
    in_blocks = modules_in(sites.all_blocks)
    before = _called_before(model, sites, sharing - in_blocks, own)
    others = [path for path, m in model.named_modules() if m in before]
    shared = sorted({key for m in sharing & in_blocks for key in keys[m]})
    for named, where in ((shared, "a block"), (others, others[0] if others else "")):
        if named:
            warnings.warn(
                f"the head of {sites.model} shares {', '.join(named[:3]) if named is shared else 'weights'} with "
                f"{where}, so training it changes that, too. Use train_head=False, or give the head weights of its own",
                stacklevel=5,
            )


def _called_before(model: nn.Module, sites: Sites, modules: Set[nn.Module], head: Set[nn.Module]) -> set[nn.Module]:
    """Return those of some modules that a forward calls before the head, such as the embedding of its inputs."""
    if not modules:
        return set()
    calls = record_calls(model, sites.input_spec, {*modules, *head})
    start = min((call.start for m, call in calls.items() if m in head), default=0)
    return {m for m in modules if m in calls and calls[m].start < start}


def _warn_of_layers_outside_blocks(attachment: Attachment) -> None:
    """Warn of attentions and MLPs in no block, if a method edits all blocks and nothing in them."""
    sites = attachment.sites
    edited = _edited_blocks(attachment)
    if not edited or sites.chosen_from is not None or len(sites.blocks) < len(sites.all_blocks):
        return
    later = [path for path, index in sites.outside_blocks.items() if index >= min(edited)]
    left = [path for path in later if not any(is_within(key, path) for key in attachment.tuned)]
    if not left:
        return
    warnings.warn(
        f"{attachment.name} edits the blocks that petune finds in {sites.model}. Attentions, MLPs and linear layers "
        f"outside of these stay as they are: {shortened(left, MAX_SHOWN)}. To train them whole, name them with the "
        f"heads: head=[…]{_advice_for_bare(attachment.model, left, MAX_SHOWN)}",
        stacklevel=5,
    )


def _edited_blocks(attachment: Attachment) -> set[int]:
    """Return the indices of the blocks with an adapter or a matrix that trains; biases and norms are elsewhere, too."""
    trained = {id(p) for p in attachment.tuned.values() if p.ndim >= 2}
    ends = {passed[-1].exit for _, passed in attachment.edit_log.placed}
    edited: set[int] = set()
    for block in attachment.sites.blocks:
        own = {p for m in (*block.own_modules, block.enter, block.exit) for p in m.parameters()}
        if not ends.isdisjoint(modules_of([block])) or any(id(p) in trained for p in own):
            edited.add(block.index)
    return edited


def _warn_of_further_norms(attachment: Attachment) -> None:
    """Warn of norms after the last block, if a method acts on the norms of blocks and not on these."""
    sites = attachment.sites
    norms = [norm for block in sites.blocks for norm in block.norms]
    trained = {id(p) for p in attachment.edit_log.unfrozen}  # and not an adapter of the block that its norm holds
    placed = [passed[-1] for _, passed in attachment.edit_log.placed]
    acts = any(site is norm for site in placed for norm in norms) or any(
        id(p) in trained for norm in norms for p in norm.enter.parameters()
    )
    reached = {site.exit for site in placed}
    further = [norm for tower in sites.towers for norm in tower.further_norms if norm.enter not in reached]
    left = [norm.path for norm in further if not any(is_within(key, norm.path) for key in attachment.tuned)]
    if acts and left and sites.chosen_from is None:
        warnings.warn(
            f"{attachment.name} leaves norms after the last block of {sites.model} as they are: {', '.join(left)}. To "
            "train them, name them with the heads: head=[…]",
            stacklevel=5,
        )


def _warn_of_norms_between(attachment: Attachment) -> None:
    """Warn of norms between blocks, if a method trains the norms of the block before and not these.

    A method with adapters at norms says itself where it has none.
    """
    sites = attachment.sites
    trained = {id(p) for p in attachment.edit_log.unfrozen}
    of_norms = {b.index: {id(p) for norm in b.norms for p in norm.enter.parameters()} for b in sites.blocks}
    acts = {index for index, own in of_norms.items() if own and own <= trained}  # bitfit trains the biases alone
    between = [path for path, index in sites.layers.norms_between.items() if index in acts]
    left = [path for path in between if not any(is_within(key, path) for key in attachment.tuned)]
    if left and sites.chosen_from is None:
        warnings.warn(
            f"{attachment.name} leaves norms outside the blocks of {sites.model} as they are: "
            f"{shortened(left, MAX_SHOWN)}. norm and full train them",
            stacklevel=5,
        )


def _warn_of_unadapted_mlps(attachment: Attachment) -> None:
    """Warn if adapters act at the MLP of a block, and not at its MLPs for other tokens (`Block.split_mlps`)."""
    pairs = [
        (block.mlp if "mlp" in block.parts else block, other)
        for block in attachment.sites.blocks
        if block.split_mlps and _acts_at_mlp(attachment, block)
        for other in block.split_mlps
        if not _acts_in(attachment, modules_in([other]))
    ]
    if not pairs:
        return
    adapted = list(dict.fromkeys(site.where for site, _ in pairs))
    left = list(dict.fromkeys(site.where for _, site in pairs))
    warnings.warn(
        f"blocks of {attachment.sites.model} have several MLPs, each for other tokens. {attachment.name} adapts "
        f"{shortened(adapted, MAX_MLPS)} and leaves {shortened(left, MAX_MLPS)} as they are, with the tokens that "
        "go through these. To reach all, use bitfit, partial or full, or lora with PEFT's option target_modules",
        stacklevel=5,
    )


def _acts_at_mlp(attachment: Attachment, block: Block) -> bool:
    """Return whether an adapter acts at a block's MLP, its norm, the stream before it, or at either end of the block.

    At its ends are all its tokens, unless the block has several streams, of which its MLP and an adapter have one.
    """
    placed = attachment.edit_log.placed
    own = [site for site in block.branches if site.role == "mlp"]
    around = {norm.enter for norm in block.norms if norm.role == "norm2"}
    is_a_stream = "mid" in block.parts
    of_streams = [sites for holder, sites in placed if isinstance(holder, After | Before | Gather | Parallel | Side)]
    if is_a_stream and any(site is block for sites in of_streams for site in sites):
        return True
    return _acts_in(attachment, modules_in(own)) or not around.isdisjoint(_ends_of_placed(attachment))


def _acts_in(attachment: Attachment, modules: set[nn.Module]) -> bool:
    """Return whether an adapter reads or acts at some modules, or a matrix trains in them."""
    trained = {id(p) for p in attachment.tuned.values() if p.ndim >= 2}
    return not modules.isdisjoint(_ends_of_placed(attachment)) or any(
        id(p) in trained for m in modules for p in m.parameters()
    )


def _ends_of_placed(attachment: Attachment) -> set[nn.Module]:
    sites = (site for _, passed in attachment.edit_log.placed for site in passed)
    return {end for site in sites for end in (site.enter, site.exit)}
