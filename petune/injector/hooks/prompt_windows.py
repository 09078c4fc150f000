"""Prompts that go on from attention to attention, where blocks cannot pass them on as tokens of their own.

A block in windows, or one that is no module, has no place for a token without a place. Its prompts are kept beside the
stream: in every window of their image while the block attends, averaged over the windows behind it, then changed by
the block's norms and MLP as each of its tokens is. That a block does no more than this to a token is proven on its own
tokens beforehand (`is_plain`).

Shapes: B images, W windows of an image, N tokens of a window, P prompts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.injector.hooks.base import Args, InnerPrompts, Kwargs, first_tensor, with_first_tensor, with_tensor
from petune.injector.hooks.hidden_prompts import same
from petune.injector.hooks.prompt_check import Seen
from petune.sites.site import Block


@dataclass
class Plain:
    """What a block does to a token, but for the attention: `norms` and MLP around two additions."""

    block: Block

    def attended(self, x_BPD: Tensor, change: Tensor) -> Tensor:
        """The stream behind the attention, which returned `change`."""
        norm = None if self.block.norm_first else self.norm_of(self.block, "norm1", "attn")
        stream: Tensor = x_BPD + (change if norm is None else norm(change))
        return stream

    def after_mlp(self, x_BPD: Tensor) -> Tensor:
        """The stream behind the MLP."""
        mlp, norm = self.block.mlp.enter, self.norm_of(self.block, "norm2", "mlp")
        if norm is None:
            change: Tensor = mlp(x_BPD)
        else:
            change = mlp(norm(x_BPD)) if self.block.norm_first else norm(mlp(x_BPD))
        return x_BPD + change

    @staticmethod
    def norm_of(block: Block, norm: str, branch: str) -> nn.Module | None:
        """The norm beside a branch; one inside it acts by itself."""
        inside = set(block.parts[branch].enter.modules()) if branch in block.parts else set()
        return block.parts[norm].enter if norm in block.parts and block.parts[norm].enter not in inside else None


def is_plain(block: Block, seen: Seen) -> bool:
    """Whether `Plain` computes what the block made of its own tokens in the forward that was seen."""
    stream, change, mid = seen.stream, seen.attended, seen.mid
    if "mlp" not in block.parts or not block.mlp.is_module or "BCHW" in (block.layout, block.mlp.layout):
        return False
    if (
        stream is None
        or change is None
        or mid is None
        or mid.shape[-1] != stream.shape[-1]
        or mid.numel() != stream.numel()
    ):
        return False
    if stream.is_meta:  # no numbers to compare: what only shows the model takes its word
        return True
    plain, (entered, added, behind) = Plain(block), (t.flatten(0, -2) for t in (stream, change, mid))
    some = slice(0, None, max(1, len(behind) // 64))
    expected = plain.attended(torch.zeros_like(added), added).double()  # in the order of windows, and padded
    nearest = torch.cdist((behind[some] - entered[some]).double(), expected).amin(1)
    if float(nearest.max()) > 1e-4 * float(behind.abs().max()):
        return False
    left = seen.left if block.is_module else mid.reshape_as(seen.left) + seen.left
    try:
        behind = plain.after_mlp(mid)
    except RuntimeError:  # the MLP or its norm cannot be called with the stream as it is
        return False
    return behind.numel() == left.numel() and same(behind.reshape_as(left), left)


class WindowHook:
    """One block of the prompts' way: hooks on its attention.

    Args:
        holder: Has the adapter, and `kept` between two blocks.
        block: The block.
        fills: See `petune.anatomy.positions.fills`.
        place: (first, last) of the way?
    """

    def __init__(self, holder: WindowPrompts, block: Block, fills: dict[int | str, float], place: Any) -> None:
        self.holder, self.plain, self.fills, (self.first, self.last) = holder, Plain(block), fills, place
        self.norm = Plain.norm_of(block, "norm1", "attn") if block.norm_first else None

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Pre-hook of the attention: the prompts go into every window of their image."""
        holder = self.holder
        if not holder.enabled:
            return None
        x_BND = first_tensor(args, kwargs)
        if self.first:
            prompts = holder.adapter(x_BND)
            one_each = prompts[:: max(1, len(prompts) // holder.images)]  # of an image's windows the first
            holder.kept = one_each.to(x_BND.dtype).expand(holder.images, -1, -1)
        if holder.kept is None:
            raise RuntimeError(
                "prompts go on from block to block, but none came from the block before. Blocks must be called in "
                "their order, and in the same segment of gradient checkpointing"
            )
        prompts_BPD = holder.kept if self.norm is None else self.norm(holder.kept)
        windows = prompts_BPD.repeat_interleave(len(x_BND) // holder.images, 0)
        return holder.padded_with(*with_first_tensor(args, kwargs, holder.with_prompts(x_BND, windows)), self.fills)

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Hook of the attention: the prompts go on, averaged over the windows of their image."""
        return with_tensor(output, self._cut) if self.holder.enabled else None

    def _cut(self, x_BND: Tensor) -> Tensor:
        holder, kept = self.holder, self.holder.kept
        changes_BPD = x_BND[..., holder.index : holder.index + holder.num_prompts, :]
        changes = changes_BPD.reshape(holder.images, -1, *changes_BPD.shape[-2:])
        holder.kept = None
        if kept is not None and not self.last:
            holder.kept = self.plain.after_mlp(self.plain.attended(kept, changes.mean(1)))
        return holder.cut(x_BND)


class WindowPrompts(InnerPrompts):
    """Holds the adapter of prompts that go through several attentions, and the prompts between two of them."""

    images = 1
    kept: Tensor | None = None

    def start(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Pre-hook of the first block: how many images there are."""
        self.images = len(first_tensor(args, kwargs))

    def forget(self) -> None:
        self.kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}
