"""Warn an author whose adapter does not see the prompts that it may be meant for."""

from __future__ import annotations

import warnings

from petune.injector.edit_log import EditLog
from petune.injector.hooks.around import Around
from petune.injector.hooks.prompts import Prompts


def warn_of_hidden_prompts(log: EditLog) -> None:
    """Warn of an adapter around one of several blocks that prompts pass through: it gets tokens without them."""
    spans = [{entered.module for entered in h.entered} for h, _ in log.placed if isinstance(h, Prompts)]
    for holder, sites in log.placed:
        if not isinstance(holder, Around):
            continue
        inside = {link.module for link in holder.links}
        if any(inside & span and span - inside for span in spans):
            warnings.warn(
                f"{type(holder.adapter).__name__} is around {sites[0].path}, one of several blocks that prompts pass "
                "through, and does not see them: they enter and leave inside of inner. To change the prompts, use "
                "edit.before or edit.after at the block, or edit.around at its layers",
                stacklevel=4,
            )
            return
