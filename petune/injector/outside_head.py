"""Find what predictions depend on besides backbone and heads: pooling, recurrent layers, single parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

from torch import nn

from petune.sites.heads_by_library import classifiers_of
from petune.sites.norms import is_norm_module
from petune.sites.recorder import record_calls
from petune.sites.site import is_within, modules_of
from petune.sites.sites import Sites
from petune.sites.used_parameters import parameters_after


def parameters_outside(model: nn.Module, sites: Sites) -> list[str]:
    """Return paths of modules, and keys of single parameters, that act after the blocks and are in no head.

    Also named is what only the output in train mode depends on, such as the exits of a model with early exits. A norm
    of tokens counts as the backbone's, and so do layers inside the module that holds all blocks. Of a model that
    neither returns logits of an image nor names its classifiers, only single parameters are named, such as queries.

    Returns:
        Empty if it cannot be known.
    """
    encoder = _module_around_blocks(model, sites)
    blocks, spec = sites.all_blocks, sites.input_spec
    enters = [block.enter for block in blocks]
    if not blocks:
        return []
    parts = [module for part in sites.parts.values() for module in part.modules]
    backbones = (encoder, *_named_backbones(model, sites), *_stages(model, sites))
    around = [module for module in backbones if module is not model]
    own = modules_of(blocks) | {m for module in (*parts, *around) for m in module.modules()}
    known = {id(p) for module in own for p in module.parameters(recurse=False)}
    after, idle = parameters_after(model, spec, enters)
    if not {id(p) for p in idle} <= known or not after:  # they may act in train mode
        after += parameters_after(model, spec, enters, training=True)[0]
    others = {id(p) for p in after} - known
    if classifiers_of(model) is None and not _predicts_classes(model, sites):
        return _queries(model, sites)
    if not others:
        return []
    others -= {id(p) for norm in _norms_of_tokens(model, sites, others) for p in norm.parameters()}
    return list(_largest(model, "", others))


def _predicts_classes(model: nn.Module, sites: Sites) -> bool:
    """Return whether the model returns one row for each image; of boxes and maps, all that comes last is a head."""
    logits = record_calls(model, sites.input_spec, [model])[model].output
    return logits is not None and logits.ndim <= 2


def _queries(model: nn.Module, sites: Sites) -> list[str]:
    """Return keys of single parameters that modules with a head hold, and that act after the first block begins."""
    heads = set(sites.head.modules)
    owners = [(path, m) for path, m in model.named_modules() if not heads.isdisjoint(m.modules()) and m not in heads]
    after, _ = parameters_after(model, sites.input_spec, [sites.all_blocks[0].enter])
    acting = {id(p) for p in after}
    own = ((f"{path}.{name}".lstrip("."), p) for path, m in owners for name, p in m.named_parameters(recurse=False))
    return [key for key, p in own if id(p) in acting]


def _module_around_blocks(model: nn.Module, sites: Sites) -> nn.Module:
    """Return the innermost module that is called and holds all blocks."""
    paths = [path for block in sites.all_blocks for path in (block.path, block.exit_path)]
    around = [m for path, m in model.named_modules() if all(is_within(p, path) and p != path for p in paths)]
    called = [m for m in around if type(m).forward is not nn.Module.forward and not isinstance(m, nn.ModuleList)]
    return called[-1] if called else model


def _named_backbones(model: nn.Module, sites: Sites) -> list[nn.Module]:
    """Return the parts with blocks that name a classifier of their own: a timm model without one is a backbone."""
    inside = [(path, m) for path, m in model.named_modules() if path and classifiers_of(m) is not None]
    return [m for path, m in inside if any(is_within(block.path, path) for block in sites.all_blocks)]


def _stages(model: nn.Module, sites: Sites) -> list[nn.Module]:
    """Return the modules that hold some of the blocks, of a model that names its classifiers (timm's CrossViT)."""
    if classifiers_of(model) is None:
        return []
    paths = [block.path for block in sites.all_blocks]
    inside = [(path, m) for path, m in model.named_modules() if path and type(m).forward is not nn.Module.forward]
    return [m for path, m in inside if any(is_within(block, path) and block != path for block in paths)]


def _norms_of_tokens(model: nn.Module, sites: Sites, parameters: Set[int]) -> Sequence[nn.Module]:
    """Return the norms among some parameters but those of pooled features, after the final norm."""
    norms = [m for m in model.modules() if is_norm_module(m) and any(id(p) in parameters for p in m.parameters())]
    finals = [tower.norm.enter for tower in sites.towers if tower.norm is not None]
    if not norms or not finals:
        return norms
    calls = record_calls(model, sites.input_spec, [*norms, *finals])
    end = max((calls[final].stop for final in finals if final in calls), default=0)

    def is_of_features(norm: nn.Module) -> bool:
        call = calls.get(norm)
        return call is not None and call.start > end > 0 and call.output is not None and call.output.ndim == 2

    return [norm for norm in norms if not is_of_features(norm)]


def _largest(module: nn.Module, path: str, parameters: Set[int]) -> Iterator[str]:
    """Yield the paths of the largest modules with no other parameters, and the keys of parameters outside these."""
    inside = {id(p) for p in module.parameters()}
    if path and inside and inside <= parameters:
        yield path
        return
    prefix = f"{path}." if path else ""
    yield from (f"{prefix}{name}" for name, p in module.named_parameters(recurse=False) if id(p) in parameters)
    for name, child in module.named_children():
        if not parameters.isdisjoint({id(p) for p in child.parameters()}):
            yield from _largest(child, f"{prefix}{name}", parameters)
