"""Refuse to change a module that is called elsewhere, too: in another block, or for another site of its block."""

from __future__ import annotations

from collections.abc import Iterable, Set

from torch import nn

from petune.base.errors import AttachError
from petune.sites.site import Site
from petune.sites.sites import Sites


def refuse_shared(sites: Sites, shared: Set[nn.Module], site: Site) -> None:
    """Refuse an adapter for one site that would act at another one.

    Args:
        sites: The chosen blocks.
        shared: See `Sites.shared_with_left_out`.
        site: Where the adapter acts.

    Raises:
        AttachError: The module is that of another site, too.
    """
    refuse_shared_with_left_out(sites, shared, (site.enter, site.exit), site)
    if sites.first_owner(site) is not None:
        raise AttachError(
            f"two blocks of {sites.model} share {site.where} ({site.role}). An adapter for one of them would "
            "act in both. Use a method that edits the layers inside, such as lora, or one that edits other sites"
        )
    twin = _twin(sites, site)
    if twin is not None:
        raise AttachError(
            f"{twin.role} and {site.role} of a block of {sites.model} are one module, {site.where}. An "
            f"adapter for {site.role} would act at {twin.role}, too. Edit each of block.norms and "
            "block.branches once"
        )


def refuse_shared_with_left_out(sites: Sites, shared: Set[nn.Module], modules: Iterable[nn.Module], site: Site) -> None:
    """Refuse to change modules that a block which was left out calls, too.

    Args:
        sites: The chosen blocks.
        shared: See `Sites.shared_with_left_out`.
        modules: What would change.
        site: The site that they are of.

    Raises:
        AttachError: One of them is shared.
    """
    if shared.isdisjoint(modules):
        return
    raise AttachError(
        f"{site.where} ({site.role}) of {sites.model} is in blocks that were left out, too, and a change would act "
        "there. Leave blocks out, or use a method that edits other sites, such as adaptformer"
    )


def _twin(sites: Sites, site: Site) -> Site | None:
    """Return the site of another role, listed before `site` in its block, that is the same module."""
    block = next((b for b in sites.blocks if any(part is site for part in b.inner_sites)), None)
    same = [s for s in block.inner_sites if s.exit is site.exit and not s.read_only] if block is not None else []
    return same[0] if same and same[0].role != site.role and not site.read_only else None
