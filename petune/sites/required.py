"""Check what the verbs of `Edit` are given: a site, one that can be changed, one that is a module."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from petune.base.arguments import LONGEST_SHOWN
from petune.base.config import shown
from petune.base.errors import AttachError
from petune.sites.site import Block, Site


def require_site(site: object, verb: str) -> Site:
    """Return the argument of a verb of `Edit`, if it is a site.

    Raises:
        AttachError: It is something else.
    """
    if isinstance(site, Site):
        return site
    raise AttachError(
        f"{verb} takes a site, such as block.attn, but was given {type(site).__name__}. "
        f"For a layer that is no site of its own, use edit.site(module)"
    )


def require_parameters(given: object, verb: str) -> list[nn.Parameter]:
    """Return the argument of a verb of `Edit` as a list, if it is parameters.

    Raises:
        AttachError: It is something else.
    """
    items = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    parameters = [item for item in items if isinstance(item, nn.Parameter)]
    other = next((item for item in items if not isinstance(item, nn.Parameter)), None)
    if other is None:
        return parameters
    raise AttachError(
        f"{verb} takes a module, a site, or a list of parameters, but was given {shown(other, LONGEST_SHOWN)}. Call it "
        "for each of several modules or sites; model.get_submodule(path) returns the module at a path"
    )


def require_editable(site: object, verb: str) -> Site:
    """Return a site that a verb wants to change, if it can be changed.

    Raises:
        AttachError: It is no site, or a tensor between modules.
    """
    site = require_site(site, verb)
    if site.read_only:
        raise AttachError(
            f"{verb} changes what a module receives or returns, but {site.role!r} ({site.where}) is a tensor between "
            "modules. Read it with parallel, as the first site, or replace it with stream"
        )
    return site


def require_readable(site: object, verb: str, *, leaving: bool) -> Site:
    """Return a site at which a verb reads what enters it, or what leaves it.

    Raises:
        AttachError: It is no site, or a tensor between modules, which no module returns.
    """
    site = require_site(site, verb)
    if leaving and site.read_only:
        raise AttachError(
            f"{verb} reads what leaves a module with leaving=True, but {site.role!r} ({site.where}) is a tensor "
            "between modules, which no module returns. Leave out leaving=True"
        )
    return site


def require_stream(site: object, verb: str) -> Site:
    """Return a site that is a tensor between modules.

    Raises:
        AttachError: It is no site, or what enters or leaves a module.
    """
    site = require_site(site, verb)
    if not site.read_only:
        raise AttachError(
            f"{verb} replaces a tensor between modules, such as block.mid, but {site.role!r} ({site.where}) is a part "
            "of the model. Use before or after for what enters or leaves it"
        )
    return site


def require_input(site: Site, verb: str) -> Site:
    """Return a site whose input a verb wants to change, if the input is the site's own.

    Raises:
        AttachError: It is a part of what a layer returns.
    """
    if site.part is not None:
        raise AttachError(
            f"{verb} changes what enters a site, but {site.where} is a part of what {site.path} returns, and the whole "
            "layer reads that input. Use after or parallel"
        )
    return site


def require_all_channels(site: Site, verb: str) -> Site:
    """Return a site of which a verb takes all channels.

    Raises:
        AttachError: It is a part of what a layer returns.
    """
    if site.part is not None:
        raise AttachError(
            f"{verb} takes all of a site, but {site.where} is a part of what {site.path} returns. Use after or "
            "parallel, or give the layer itself"
        )
    return site


def require_block(block: object, verb: str) -> Block:
    """Return a block.

    Raises:
        AttachError: It is something else, such as a site inside it.
    """
    if not isinstance(block, Block):
        raise AttachError(f"{verb} takes a block, such as edit.sites.blocks[0], but was given a {type(block).__name__}")
    return block


def require_whole(site: Site, verb: str) -> Site:
    """Return a site that a verb wants to change as a whole, if one module holds all of it.

    Raises:
        AttachError: It is a block that is not a module of its own.
    """
    if isinstance(site, Block) and not site.is_module:
        raise AttachError(
            f"{verb} needs a block that is one module, but block {site.index} of {site.model} is a span of the forward "
            f"({site.where}): only its ends would change. Use a method that edits attention or MLP, or full"
        )
    return site
