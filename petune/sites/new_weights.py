"""Find weights that a checkpoint did not fill, where the model still says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

from torch import Tensor, nn

from petune.sites.heads_by_library import NamedModules
from petune.sites.heads_by_user import outermost
from petune.sites.site import Block

FLAG = "_is_hf_initialized"
"""Set by transformers on each parameter that `from_pretrained` has filled from the checkpoint."""


@dataclass(frozen=True)
class NewWeights:
    """The parameters that a checkpoint did not fill.

    Attributes:
        is_known: False for a model that does not say what was filled.
        keys: The parameters.
        modules: The largest modules whose parameters are all new.
    """

    is_known: bool
    keys: tuple[str, ...] = ()
    modules: NamedModules = ()


def new_weights(model: nn.Module) -> NewWeights:
    """Return what `from_pretrained` of transformers left at random values, without mask tokens of pretraining.

    A parameter of another type, as quantized weights are, was made of one later, and says nothing about it.
    """
    named = dict(model.named_parameters())
    if not any(getattr(p, FLAG, False) for p in named.values()):
        return NewWeights(is_known=False)
    unfilled = {key for key, p in named.items() if not getattr(p, FLAG, type(p) is not nn.Parameter)}
    keys = [key for key in named if key in unfilled and not key.endswith("mask_token")]
    new = {id(named[key]) for key in keys}
    return NewWeights(True, tuple(keys), outermost(_whole(model, "", new)))


def placed_in_blocks(blocks: Iterable[Block]) -> set[int]:
    """Return the ids of the parameters of modules that were put into blocks after loading.

    Their values are not those of a checkpoint, but whoever put them there has chosen these. transformers marks the
    modules that it loads, as it does parameters.
    """
    loaded = [block.enter for block in blocks if hasattr(block.enter, FLAG)]
    placed = [m for module in loaded for m in module.modules() if not hasattr(m, FLAG)]
    return {id(p) for module in placed for p in module.parameters(recurse=False)}


def keep_flag(new: nn.Parameter, old: Tensor) -> nn.Parameter:
    """Return a parameter that replaces another one, marked as filled from the checkpoint if that one was."""
    if hasattr(old, FLAG):
        setattr(new, FLAG, getattr(old, FLAG))
    return new


def _whole(module: nn.Module, path: str, new: Set[int]) -> Iterator[tuple[str, nn.Module]]:
    parameters = [id(p) for p in module.parameters()]
    if path and parameters and new >= {*parameters}:
        yield path, module
    elif not new.isdisjoint(parameters):
        for name, child in module.named_children():
            yield from _whole(child, f"{path}.{name}" if path else name, new)
