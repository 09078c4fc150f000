"""Place prompts: tokens behind the prefix tokens of blocks, or inside attentions that see windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from petune.base.errors import AttachError, SiteNotFound
from petune.injector.hooks.base import InnerPrompts, Prompts
from petune.injector.hooks.position_bias import Room, admit_prompts, fills, is_inside, refused
from petune.injector.hooks.prompt_check import Prompting
from petune.injector.hooks.prompt_windows import WindowHook, WindowPrompts, is_plain
from petune.injector.placement import Placer
from petune.sites.site import Block, Site, Sites

USE_DEEP = "Try prompts of each block's own (vpt:deep=true), or a method without prompts, such as adaptformer"
DISABLE_OTHER = "Attach one method with as many prompts, or disable the other one first (attachment.disable())"


class PromptPlacer:
    """Puts prompts into blocks, and proves that they falsify nothing there."""

    def __init__(self, model: nn.Module, sites: Sites, placer: Placer) -> None:
        self.model = model
        self.sites = sites
        self.placer = placer
        self.prompting = Prompting(model, sites)

    def place(self, blocks: Block | Sequence[Block], adapter: nn.Module) -> None:
        """See `Edit.prompt`."""
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
        self._refuse_prompts_of_others(run[0])
        self.placer.log.enable_checks.append(lambda: self._refuse_prompts_of_others(run[0]))
        if not is_inside(run[0]):
            self._into_blocks(run, adapter, count)
        elif len(run) == 1:
            self._into_attention(run[0], adapter, count)
        else:
            self._through_attentions(run, adapter, count)

    def span(self) -> tuple[Block, ...]:
        """See `Edit.prompt_span`."""
        first, *others = self.sites.require_blocks()
        room = self.prompting.room(first, 1)
        fits = [first.dim == b.dim and self.prompting.room(b, 1) == room for b in others]
        return (first, *others[: (*fits, False).index(False)])

    def forget(self) -> None:
        """Drop the recorded forward, which holds every activation of one image."""
        self.prompting = Prompting(self.model, self.sites)

    def _into_blocks(self, run: tuple[Block, ...], adapter: nn.Module, count: int) -> None:
        """Let prompts enter at the first block and leave after the last one."""
        room = self.prompting.room(run[0], count)
        for block in run:
            if block.dim != run[0].dim or self.prompting.room(block, count) != room:
                reason = f"has other tokens than {run[0].path}, where they come in: they are pooled or merged between"
                raise refused(block, self.sites, reason, USE_DEEP)
        self._admit(run, room)
        holder = Prompts(adapter, room, fills(run[0]))
        self.placer.add(holder, run[0], run[0], run[-1])
        hook = self.placer.hook
        # outermost of all hooks: other adapters see the prompts as tokens, and nested prompts leave in turn
        hook(run[0].enter.register_forward_pre_hook(holder.enter, with_kwargs=True, prepend=True))
        for block in run[1:]:
            hook(block.enter.register_forward_pre_hook(holder.pass_through, with_kwargs=True, prepend=True))
        hook(run[-1].exit.register_forward_hook(holder.leave))
        self.prompting.prove(run, room)

    def _into_attention(self, block: Block, adapter: nn.Module, count: int) -> None:
        """Let prompts enter and leave the attention of one block."""
        attn, room = block.attn, self.prompting.room(block, count)
        self._admit((block,), room)
        norm = block.parts.get("norm1") if block.norm_first else None
        if norm is not None and norm.enter in set(attn.enter.modules()):
            norm = None  # the attention normalizes them itself
        holder = InnerPrompts(adapter, room, fills(block), norm)
        self.placer.add(holder, block, attn)
        self.placer.hook(attn.enter.register_forward_pre_hook(holder.enter, with_kwargs=True, prepend=True))
        self.placer.hook(attn.exit.register_forward_hook(holder.leave))
        self.prompting.prove((block,), room)

    def _through_attentions(self, run: tuple[Block, ...], adapter: nn.Module, count: int) -> None:
        """Carry prompts from the attention of one block to that of the next."""
        room = self.prompting.room(run[0], count)
        self._admit(run, room)
        for block in run[:-1]:
            with torch.no_grad():
                plain = is_plain(block, self.prompting.seen(block))
            if not plain or any(not is_inside(b) for b in run):
                reason = "has no way out for them: they stay in its attention, and cannot go on to the next block"
                raise refused(block, self.sites, reason, USE_DEEP)
        holder, hook = WindowPrompts(adapter, room, {}, None), self.placer.hook
        self.placer.add(holder, run[0], *(b.attn for b in run))
        for block in run:
            attn = block.attn
            window = WindowHook(holder, block, fills(block), (block is run[0], block is run[-1]))
            hook(attn.enter.register_forward_pre_hook(window.enter, with_kwargs=True, prepend=True))
            hook(attn.exit.register_forward_hook(window.leave))
        # first of all hooks, because the attention may be what enters the block
        hook(run[0].enter.register_forward_pre_hook(holder.start, with_kwargs=True, prepend=True))
        self.prompting.prove(run, room)

    def _admit(self, run: tuple[Block, ...], room: Room) -> None:
        """Tell the attentions of the blocks about the prompts, for as long as the attachment is enabled."""
        for block in run:
            for switch in admit_prompts(block, self.sites, room):
                self.placer.toggle(switch, on=False)

    def _refuse_prompts_of_others(self, block: Site) -> None:
        own = {id(holder) for holder, _ in self.placer.log.placed}
        if any(isinstance(m, Prompts) and m.enabled and id(m) not in own for m in self.model.modules()):
            reason = "has prompts of another attachment; petune cannot prove that both together are right"
            raise refused(block, self.sites, reason, DISABLE_OTHER)
