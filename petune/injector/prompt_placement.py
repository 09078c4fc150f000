"""Place prompts: tokens after the prefix tokens of blocks, or inside attentions that see windows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from petune.base.errors import AttachError, SiteNotFound
from petune.injector.hooks.around import Around
from petune.injector.hooks.base import resting
from petune.injector.hooks.keys_values import KeysValues
from petune.injector.hooks.position_bias import paddings, position_switches
from petune.injector.hooks.prompt_check import PromptCheck
from petune.injector.hooks.prompt_slot import PromptSlot, enters_attention_only, prompts_refused, refuse_obstacles
from petune.injector.hooks.prompts import AttentionPrompts, PromptedModule, Prompts
from petune.injector.hooks.reading import Gather
from petune.injector.hooks.side import Side
from petune.injector.placement import Placer
from petune.sites.site import Block, Site, modules_of
from petune.sites.sites import Sites

USE_DEEP = "Use prompts in each block (vpt:deep=true), or a method without prompts, such as adaptformer"
DISABLE_OTHER = "Attach one method with as many prompts, or disable the other one first (attachment.disable())"

OTHERS = (Around, KeysValues, Gather, Side)
"""Holders that say nothing about a block, and need other blocks or bring other keys than those of its tokens."""


class PromptPlacer:
    """Puts prompts into blocks, and proves that they falsify nothing there."""

    def __init__(self, model: nn.Module, sites: Sites, placer: Placer) -> None:
        self.model = model
        self.sites = sites
        self.placer = placer
        self.check = PromptCheck(model, sites)

    def place(self, blocks: Block | Sequence[Block], adapter: nn.Module) -> None:
        """See `Edit.prompt`."""
        with resting(self.model, *OTHERS):
            self._place(blocks, adapter)

    def _place(self, blocks: Block | Sequence[Block], adapter: nn.Module) -> None:
        run = (blocks,) if isinstance(blocks, Block) else tuple(blocks)
        if not run:
            self.sites.require_blocks()
            raise SiteNotFound("prompt needs one block or more, but was given none")
        count = getattr(adapter, "num_prompts", None)
        if not isinstance(count, int) or count < 1:
            raise AttachError(
                f"num_prompts of the prompt adapter {type(adapter).__name__} is {count!r}. Use a whole number of 1 or "
                "more"
            )
        self._refuse_gaps(run)
        for block in run:
            refuse_obstacles(block, self.sites)
        self._refuse_twice(run)
        self._refuse_prompts_of_others(run[0])
        self.placer.log.enable_checks.append(lambda: self._refuse_prompts_of_others(run[0]))
        if not enters_attention_only(run[0], self.sites):
            if not isinstance(blocks, Block):
                self._refuse_repeated(run)
            self._into_blocks(run, adapter, count)
        elif len(run) == 1:
            self._into_attention(run[0], adapter, count)
        else:
            reason = "lets them into its attention only, so that they cannot pass on to the next block"
            if not run[0].is_module:
                reason = f"is no module ({run[0].where}): they come into its attention only, not to the next block"
            raise prompts_refused(run[0], self.sites, reason, USE_DEEP)

    def span(self, first: Block | None = None) -> tuple[Block, ...]:
        """See `Edit.prompt_span`."""
        with resting(self.model, *OTHERS):
            return self._span(first)

    def _span(self, first: Block | None) -> tuple[Block, ...]:
        first = first or self.sites.require_blocks()[0]
        row = next((tower.blocks for tower in self.sites.towers if first in tower.blocks), (first,))
        others = row[row.index(first) + 1 :]
        slot = self.check.slot(first, 1)
        fits = [first.dim == b.dim and self.check.slot(b, 1) == slot for b in others]
        return (first, *others[: (*fits, False).index(False)])

    def forget(self) -> None:
        """Drop the recorded forward, which holds every activation of one image."""
        self.check = PromptCheck(self.model, self.sites)

    def _refuse_gaps(self, run: tuple[Block, ...]) -> None:
        """Refuse blocks with others between them, which the prompts would pass through unprepared."""
        rows = [tower.blocks for tower in self.sites.all_towers] or [self.sites.all_blocks]
        neighbors = {(before.index, block.index) for row in rows for before, block in pairwise(row)}
        for before, block in pairwise(run):
            if (before.index, block.index) not in neighbors:
                reason = f"is no neighbor of block {before.index}, and the prompts would pass through what is between"
                raise prompts_refused(block, self.sites, reason, USE_DEEP)

    def _refuse_repeated(self, run: tuple[Block, ...]) -> None:
        """Refuse blocks that the same tokens pass several times: prompts would leave and enter between two passes."""
        if self.check.passes_again(run):
            reason = "is called again with what it returned, and the prompts would not pass on to the next call"
            raise prompts_refused(run[0], self.sites, reason, USE_DEEP)

    def _into_blocks(self, run: tuple[Block, ...], adapter: nn.Module, count: int) -> None:
        """Let prompts enter at the first block and leave after the last one."""
        slot = self.check.slot(run[0], count)
        for block in run:
            if block.dim != run[0].dim or self.check.slot(block, count) != slot:
                reason = f"has other tokens than {run[0].path}, because they are pooled or merged in between"
                raise prompts_refused(block, self.sites, reason, USE_DEEP)
        self._admit(run, slot)
        holder = Prompts(adapter, slot, paddings(run[0], self.sites))
        self.placer.add(holder, run[0], run[0], run[-1])
        self.placer.log.undo_steps.append(lambda: setattr(holder, "enabled", False))
        for index, block in enumerate(run):
            self._hook(PromptedModule(holder, block.enter, index, last=block is run[-1]))
        self.check.verify(run, slot, adapter)

    def _into_attention(self, block: Block, adapter: nn.Module, count: int) -> None:
        """Let prompts enter and leave the attention of one block."""
        attn, slot = block.attn, self.check.slot(block, count)
        self._admit((block,), slot)
        norm = block.parts.get("norm1") if block.norm_first else None
        if norm is not None and norm.enter in set(attn.enter.modules()):
            norm = None  # the attention normalizes them itself
        holder = AttentionPrompts(adapter, slot, paddings(block, self.sites), norm)
        self.placer.add(holder, block, attn)
        self.placer.log.undo_steps.append(lambda: setattr(holder, "enabled", False))
        self._hook(PromptedModule(holder, attn.enter, 0, last=True))
        self.check.verify((block,), slot, adapter)

    def _hook(self, prompted: PromptedModule) -> None:
        """Install the hooks of a module that prompts enter, and its forward with them."""
        module = prompted.module
        self.placer.hook(module.register_forward_pre_hook(prompted.enter, with_kwargs=True, prepend=True))
        self.placer.hook(module.register_forward_pre_hook(prompted.conceal, with_kwargs=True))
        self.placer.hook(module.register_forward_hook(prompted.leave))
        prompted.switch(True)
        prompted.holder.entered.append(prompted)

    def _admit(self, run: tuple[Block, ...], slot: PromptSlot) -> None:
        """Prepare the attentions of the blocks for the prompts, for as long as the attachment is enabled."""
        for block in run:
            for switch in position_switches(block, self.sites, slot):
                self.placer.toggle(switch, on=False)

    def _refuse_twice(self, run: tuple[Block, ...]) -> None:
        entered = {p.module for h, _ in self.placer.log.placed if isinstance(h, Prompts) for p in h.entered}
        for block in run:
            if not entered.isdisjoint(modules_of([block])):
                reason = "has prompts of this method already, whose tokens would count as the block's own"
                raise prompts_refused(block, self.sites, reason, "Insert all of them by one adapter")

    def _refuse_prompts_of_others(self, block: Site) -> None:
        own = {id(holder) for holder, _ in self.placer.log.placed}
        if any(isinstance(m, Prompts) and m.enabled and id(m) not in own for m in self.model.modules()):
            reason = "has prompts of another attachment; petune cannot prove that both together are right"
            raise prompts_refused(block, self.sites, reason, DISABLE_OTHER)
