"""Verify that prompts have an effect: a block's other tokens depend on what the prompts contain.

Shapes: B batch, N tokens, P prompts, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petune.injector.hooks.prompt_slot import PromptSlot
from petune.sites.forward import tensors_in
from petune.sites.hooked import removed_after
from petune.sites.site import Block


def prompts_have_effect(
    blocks: Sequence[Block], slot: PromptSlot, adapter: nn.Module, forward: Callable[[], Any]
) -> bool:
    """Return whether other content of the prompts changes a token that is no prompt; True on the meta device.

    Compared are what leaves the last block and what leaves the first block's attention, which a LayerScale of zero does
    not hide. Both forwards do the same operations, so that a difference is no rounding.

    Args:
        blocks: Those that the prompts pass through.
        slot: Where the prompts are.
        adapter: Returns the prompts; random numbers replace them here.
        forward: Runs the blocks.
    """
    outputs: list[list[Tensor]] = []
    for seed in range(2):
        with random_prompts(adapter, seed), _outputs(blocks, slot) as tokens:
            forward()
        outputs.append(tokens)
    first, second = outputs
    return any(x.is_meta or not torch.equal(x, y) for x, y in zip(first, second, strict=True))


def prompts_have_positions(
    blocks: Sequence[Block], slot: PromptSlot, adapter: nn.Module, forward: Callable[[], Any]
) -> bool:
    """Return whether it matters to the other tokens of the first block in which order the prompts are.

    It does not if no prompt has a position; False on the meta device, and for a single prompt.

    Args:
        blocks, slot, adapter, forward: See `prompts_have_effect`.
    """
    outputs: list[list[Tensor]] = []
    for is_reversed in (False, True):
        with random_prompts(adapter, 0, is_reversed=is_reversed), _outputs(blocks[:1], slot) as tokens:
            forward()
        outputs.append(tokens)
    return any(not x.is_meta and _differ(x, y) for x, y in zip(*outputs, strict=True))


def _differ(x: Tensor, y: Tensor) -> bool:
    """Return whether two outputs differ by more than the rounding of another order."""
    precise = x.dtype in (torch.float32, torch.float64)
    return bool((x - y).abs().max() > (1e-4 if precise else 5e-2) * x.abs().max())


@contextlib.contextmanager
def random_prompts(adapter: nn.Module, seed: int, *, is_reversed: bool = False) -> Iterator[None]:
    """Let an adapter return random numbers as prompts, by their seed, or the same ones in the opposite order."""

    def replace(module: nn.Module, args: Any, prompts: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randn(prompts.shape, generator=generator, device="cpu")
        return (numbers.flip(-2) if is_reversed else numbers).to(prompts)

    handle = adapter.register_forward_hook(replace)
    with removed_after([handle]):
        yield


@contextlib.contextmanager
def _outputs(blocks: Sequence[Block], slot: PromptSlot) -> Iterator[list[Tensor]]:
    """Collect the tokens that leave the last block and the first block's attention, without the prompts."""
    tokens: list[Tensor] = []

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        x = next(tensors_in(output))
        tokens.append(without_prompts(x, slot))

    exits = {blocks[-1].exit, blocks[0].parts.get("attn", blocks[0]).exit}
    handles = [module.register_forward_hook(leave) for module in exits]
    with removed_after(handles):
        yield tokens


def without_prompts(x_BND: Tensor, slot: PromptSlot) -> Tensor:
    """Take the prompts out, (B, N + P, D) to (B, N, D), where they are among the tokens."""
    num_tokens = slot.num_tokens + slot.num_prompts
    if x_BND.ndim < 2 or x_BND.shape[-2] != num_tokens:
        return x_BND
    after = slot.index + slot.num_prompts
    return torch.cat([x_BND[..., : slot.index, :], x_BND[..., after:, :]], -2)
