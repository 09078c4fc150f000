"""The sites that a saved adapter belongs to, in the model that it is loaded on."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from petune.adapters.format import SavedAdapter, geometry, geometry_differences
from petune.base.errors import BackboneMismatch, PetuneError
from petune.injector.trainable import trainable_state_of
from petune.sites.find import sites_for
from petune.sites.input_spec import InputSpec
from petune.sites.site import Site
from petune.sites.sites import Sites


def saved_sites(model: nn.Module, saved: SavedAdapter, sites: Sites | None) -> Sites | None:
    """Return the sites that an adapter was saved with; None if `attach` should find them and say what is wrong.

    Raises:
        BackboneMismatch: The model has no heads of the names in the file, nor others that can only be the same.
    """
    chosen = saved.config.get("chosen_sites") or {}
    state = trainable_state_of(model)
    if sites is None and state is None:
        found = sites_as_saved(model, saved.config["geometry"], chosen)
        heads = chosen.get("head") or []
        if found is None and _paths_of(model, heads) is None:
            raise BackboneMismatch(
                f"{saved.path} belongs to another backbone: {type(model).__name__} has no heads {', '.join(heads)}. If "
                "they were renamed, pass sites=petune.find_sites(model, head=[…]) with their names in the same order"
            )
        return found
    known = sites or (state.sites if state is not None else None)
    # sites that the caller has chosen stay, unless the file says which ones
    if known is None or (sites is not None and chosen.get("blocks") is None):
        return known
    return _as_chosen(known, chosen)


def _as_chosen(sites: Sites, chosen: Mapping[str, Any]) -> Sites:
    """Return the sites with the blocks and the tower that a file names."""
    within = chosen.get("within", "")
    return (sites.only(within) if within else sites).with_blocks(chosen.get("blocks"))


def sites_as_saved(model: nn.Module, saved: Mapping[str, Any] | None, chosen: Mapping[str, Any]) -> Sites | None:
    """Return the model's sites for inputs as in the file; None if its geometry is another one."""
    if saved is None:
        return None
    in_file = chosen.get("head") or []
    heads = _paths_of(model, in_file)
    # attaching without the file's inputs says what is wrong
    with contextlib.suppress(PetuneError, KeyError, TypeError, ValueError):
        found = sites_for(model, InputSpec.from_json(saved["input"]), heads or None)
        sites = _as_chosen(found, chosen)
        are_known = heads is not None or _are_renamed(found.head, in_file)
        return sites if are_known and not geometry_differences(saved, geometry(sites)) else None
    return None


def _paths_of(model: nn.Module, heads: Collection[str]) -> list[str] | None:
    """Return the paths of a file's heads, also inside a wrapper; None if the model has none of such a name."""
    names = [name for name, _ in model.named_modules()]
    found = [[name for name in names if f".{name}".endswith(f".{path}")] for path in heads]
    paths = [min(named, key=len) for path, named in zip(heads, found, strict=True) if named]
    return paths if len(paths) == len(heads) else None


def _are_renamed(found: Site, heads: Collection[str]) -> bool:
    """Return whether the heads that are found can only be those of a file, which has other names for them.

    Of two heads of the same shapes, the reference logits tell which one is which.
    """
    shapes = {tuple(tuple(p.shape) for p in module.parameters()) for module in found.modules}
    return len(found.modules) == len(heads) and (len(heads) <= 2 or len(shapes) == len(heads))


def other_sites(model: nn.Module, saved: SavedAdapter) -> str:
    """Return why a model does not have the sites of a file for inputs as in the file; empty if it has."""
    if saved.config["geometry"] is None:
        return ""
    try:
        found = sites_for(model, InputSpec.from_json(saved.config["geometry"]["input"]))
    except PetuneError as error:
        return str(error)
    return sites_differences(saved, found)


def sites_differences(saved: SavedAdapter, sites: Sites) -> str:
    """Return in what sites differ from those of a file, for a message; empty if in nothing."""
    current = geometry(sites)
    in_file = saved.config["geometry"] or current
    different = geometry_differences(in_file, current)
    return ", ".join(f"{key} {in_file.get(key)} (this model: {current[key]})" for key in different)
