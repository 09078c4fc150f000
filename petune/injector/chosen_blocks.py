"""The option `blocks` of every tuner: refuse methods that do not follow it, and name blocks that lack a site."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from petune.base.block_choice import ALL
from petune.base.errors import AttachError, SiteNotFound
from petune.base.text import plural, shortened
from petune.sites.sites import Sites

if TYPE_CHECKING:
    from petune.injector.attachment import Attachment

MAX_SHOWN = 8


@contextmanager
def missing_sites_named(sites: Sites) -> Iterator[None]:
    """Name all blocks without a site that a tuner needs, and the choice of blocks that leaves them out.

    Raises:
        SiteNotFound: A block has no such site.
    """
    try:
        yield
    except SiteNotFound as error:
        role = error.role
        missing = [block.index for block in sites.blocks if role and role not in block.parts]
        others = [block.index for block in sites.blocks if block.index not in missing]
        if not missing or not others:
            raise
        numbers = shortened([*map(str, missing)], MAX_SHOWN)
        raise SiteNotFound(
            f"{len(missing)} of {plural(len(sites.blocks), 'block')} of {sites.model} ({numbers}) lack the "
            f"site {role!r}. Leave them out with blocks={others}, or use a method that edits other sites",
            role=role,
        ) from error


def check_follows_blocks(attachment: Attachment) -> None:
    """Refuse a choice of blocks that a method does not follow: it trains others too, or edits no block at all.

    Raises:
        AttachError: See above.
    """
    _check_follows_only(attachment)
    blocks, sites = attachment.tuner.config.blocks, attachment.sites
    if blocks == ALL:
        return
    if not attachment.tuned:
        raise AttachError(f"{attachment.name} edits no block, so blocks={blocks} would do nothing. Leave blocks out")
    if sites.chosen_from is None:
        return
    left_out = {id(p) for module in sites.left_out_modules() for p in module.parameters()}
    outside = [key for key, p in attachment.tuned.items() if id(p) in left_out]
    if outside:
        raise AttachError(
            f"{attachment.name} does not follow blocks={blocks}: it trains {outside[0]} too, in a block that was left "
            "out. Leave blocks out, or use a method that edits single blocks, such as partial, which trains them whole"
        )


def _check_follows_only(attachment: Attachment) -> None:
    """Refuse a method that trains backbone parameters outside the part of the model that `sites.only` has chosen.

    Raises:
        AttachError: It does.
    """
    sites = attachment.sites.given
    outside = {id(p) for module in sites.left_out_modules() for p in module.parameters()}
    if sites.within:
        inside = {id(p) for p in attachment.model.get_submodule(sites.within).parameters()}
        outside |= {id(p) for p in attachment.model.parameters()} - inside
    trained = outside & {id(p) for p in attachment.edit_log.unfrozen}
    key = next((key for key, p in attachment.tuned.items() if id(p) in trained), None)
    if key is not None:
        raise AttachError(
            f"{attachment.name} does not follow sites.only: it trains {key} too, which the sites leave out. Use "
            "partial, which trains the blocks whole, another method, or the sites of the whole model"
        )
