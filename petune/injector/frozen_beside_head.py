"""Name what stays frozen next to the heads that train: layers between backbone and heads, and random weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Set
from contextvars import ContextVar

from torch import nn

from petune.base.errors import AttachError
from petune.base.text import plural, shortened
from petune.injector.attachment import Attachment
from petune.injector.outside_head import parameters_outside
from petune.sites.named_heads import classifiers_of
from petune.sites.new_weights import NewWeights, new_weights, placed_in_blocks
from petune.sites.recorder import record_calls
from petune.sites.site import Sites, is_within, modules_in, modules_of
from petune.sites.used_parameters import used_parameters

MAX_SHOWN = 6

_is_told: ContextVar[bool] = ContextVar("is_told", default=False)


@contextlib.contextmanager
def already_told() -> Iterator[None]:
    """Leave out the advice on what stays frozen: who trained the adapter that is loaded has had it."""
    token = _is_told.set(True)
    try:
        yield
    finally:
        _is_told.reset(token)


def warn_of_layers_before_head(model: nn.Module, sites: Sites, train_head: bool) -> None:
    """Warn of what the predictions depend on and no head has, in a model that does not say which weights are new."""
    if _is_told.get() or not train_head or "head" not in sites.parts or new_weights(model).is_known:
        return  # what a checkpoint has filled may stay frozen; the rest is a head
    layers = _used_layers(model, sites)
    named = classifiers_of(model)
    # of several predictors, some may have been forgotten
    is_known = named is not None and len(named) < 2 and sites.num_outputs < 2
    others = [] if is_known else parameters_outside(model, sites)
    layers += [key for key in others if not any(_is_same(key, layer) for layer in layers)]
    if not layers:
        return
    alone = [key for key in layers if key in dict(model.named_parameters())]
    advice = f". Put {', '.join(alone)} into a module to name it: a head is a module" if alone else ""
    warnings.warn(
        f"the head of {sites.model} is {sites.head.where}. Further layers that the predictions depend on count as "
        f"backbone and stay frozen unless the method trains them: {', '.join(layers)}. If they are new, name all "
        f'modules that train: head=["…", "…"]{advice}',
        stacklevel=4,
    )


def _used_layers(model: nn.Module, sites: Sites) -> list[str]:
    if not sites.beside_head:
        return []
    parameters = {path: list(model.get_submodule(path).parameters()) for path in sites.beside_head}
    floating = [p for layer in parameters.values() for p in layer if p.is_floating_point()]
    used = {id(p) for p in used_parameters(model, sites.input_spec, floating)}
    called = _called_on_tokens(model, sites)
    return [path for path, layer in parameters.items() if path in called or any(id(p) in used for p in layer)]


def _is_same(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def warn_of_shared_head(attachment: Attachment) -> None:
    """Warn if a head that trains shares tensors with a block or an embedding: training it changes that, too."""
    if _is_told.get():
        return
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
                stacklevel=3,
            )


def _called_before(model: nn.Module, sites: Sites, modules: Set[nn.Module], head: Set[nn.Module]) -> set[nn.Module]:
    """Return those of some modules that a forward calls before the head, such as the embedding of its inputs."""
    if not modules:
        return set()
    calls = record_calls(model, sites.input_spec, {*modules, *head})
    start = min((call.start for m, call in calls.items() if m in head), default=0)
    return {m for m in modules if m in calls and calls[m].start < start}


def warn_of_layers_outside_blocks(attachment: Attachment) -> None:
    """Warn of attentions and MLPs in no block, if a method edits all blocks and nothing in them."""
    sites = attachment.sites
    edited = _edited_blocks(attachment)
    if _is_told.get() or not edited or sites.chosen_from is not None or len(sites.blocks) < len(sites.all_blocks):
        return
    later = [path for path, index in sites.outside_blocks.items() if index >= min(edited)]
    left = [path for path in later if not any(is_within(key, path) for key in attachment.tuned)]
    if not left:
        return
    keys = {key for key, _ in attachment.model.named_parameters()}
    alone = [path for path in left if path in keys]
    advice = f". Put {shortened(alone, MAX_SHOWN)} into a module to name it: a head is a module" if alone else ""
    warnings.warn(
        f"{attachment.name} edits the blocks that petune finds in {sites.model}. Attentions, MLPs and linear layers "
        f"outside of these stay as they are: {shortened(left, MAX_SHOWN)}. To train them whole, name them with the "
        f"heads: head=[…]{advice}",
        stacklevel=3,
    )


def warn_of_further_norms(attachment: Attachment) -> None:
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
    if acts and left and sites.chosen_from is None and not _is_told.get():
        warnings.warn(
            f"{attachment.name} leaves norms after the last block of {sites.model} as they are: {', '.join(left)}. To "
            "train them, name them with the heads: head=[…]",
            stacklevel=3,
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


def _called_on_tokens(model: nn.Module, sites: Sites) -> set[str]:
    """Return those of the layers beside the head that return more than a row for each image, which a pooler does.

    D-FINE detaches what such a layer returns, and trains it by a loss of its own.
    """
    layers = {path: set(model.get_submodule(path).modules()) for path in sites.beside_head}
    calls = record_calls(model, sites.input_spec, {m for inside in layers.values() for m in inside})
    on_tokens = {m for m, call in calls.items() if call.output is not None and call.output.ndim > 2}
    return {path for path, inside in layers.items() if inside & on_tokens}


def check_new_weights(attachment: Attachment, new: NewWeights) -> None:
    """Check that what the checkpoint did not fill trains, because it is random.

    Raises:
        AttachError: Parameters that the output depends on would stay frozen.
    """
    sites, model = attachment.sites, attachment.model
    parameters = dict(model.named_parameters())
    known = {id(p) for p in attachment.tensors.trainable().values()} | placed_in_blocks(sites.all_blocks)
    frozen = {key: p for key in new.keys if (p := parameters.get(key)) is not None and id(p) not in known}
    if not frozen:
        return
    used = {id(p) for p in used_parameters(model, sites.input_spec, frozen.values())}
    keys = [key for key, p in frozen.items() if id(p) in used] or [*frozen]
    named = f"{', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
    message = (
        f"{plural(len(keys), 'parameter')} of {sites.model} got random values, because the weights that it was loaded "
        f"from lack them, or were replaced later, and {attachment.name} keeps them frozen: {named}"
    )
    owners = list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
    if used and sites.chosen_head is None:
        heads = ", ".join(repr(path) for path, _ in sites.head.named_modules)
        raise AttachError(
            f"{message}. To train the modules that hold them, use head=[{heads}, {', '.join(map(repr, owners[:3]))}]; "
            f"to keep them as they are, name the heads alone: head=[{heads}]. Or do not replace a parameter: set "
            "its values in place, by copy_ under torch.no_grad()"
        )
    warnings.warn(f"{message}. To train them, add to head: {', '.join(owners[:3])}", stacklevel=3)
