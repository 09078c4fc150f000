"""Say what is in the way of prompts in a block: found by further forwards, only when they are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.text import plural
from petune.injector.hooks.position_bias import Padding
from petune.injector.hooks.prompt_effect import random_prompts
from petune.injector.hooks.prompt_slot import PromptSlot
from petune.sites.forward import tensors_in
from petune.sites.logits import logits_of

UNSEEN = "has no token-to-token attention where they enter"
MAX_SHOWN = 4


@dataclass
class BlockCall:
    """One call of a block without prompts, for two images.

    Attributes:
        args, kwargs: The block's arguments.
        num_tokens: Number of tokens of a row that its attention saw.
        num_rows: Number of rows of tokens.
        output: The block's output.
        key_counts: Of the operations in the block, see `KeyCounts`.
        attention_keys: Of those that are attentions.
        version: How often its input was changed in place before the call.
        changes_input: True if it was in the call.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_tokens: int
    num_rows: int
    output: Any = None
    key_counts: tuple[int, ...] = ()
    attention_keys: tuple[int, ...] = ()
    version: int = 0
    changes_input: bool = False


def numbered_pairs(call: BlockCall, slot: PromptSlot, padding: Mapping[int | str, Padding]) -> int | str | None:
    """Return the argument with a whole number for each pair of tokens, such as DeBERTa's `relative_pos`.

    It chooses a position or a row of a table, and no number means a token without a position.

    Args:
        call: Of the block, without prompts.
        slot: Where the prompts are.
        padding: How arguments are padded; whole numbers in a mask mean something else.
    """
    values: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    for key, value in values:
        is_index = isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64) and value.ndim > 1
        if is_index and value.shape[-2:] == (slot.num_tokens,) * 2 and padding.get(key, Padding()).mask is None:
            return key
    return None


def why_unseen(call: BlockCall, slot: PromptSlot, num_images: int) -> str:
    """Return why no attention of a block has prompts among its keys.

    Args:
        call: Of the block, without prompts.
        slot: Where the prompts are.
        num_images: Number of images in the call.
    """
    x = next(tensors_in((call.args, call.kwargs)), None)
    if x is not None and x.ndim == 3 and x.shape[1] == num_images < len(x):
        return f"{UNSEEN}: it is called with (tokens, batch, width), and attends over the first dimension"
    counts = sorted(set(call.attention_keys))
    if not counts:
        return f"{UNSEEN}: it computes no softmax over tokens"
    if slot.num_tokens in counts:
        return f"{UNSEEN}: it attends to {slot.num_tokens} tokens with and without them, those of another stream"
    shown = ", ".join(map(str, counts[:MAX_SHOWN]))
    return (
        f"{UNSEEN}: {slot.num_tokens} tokens enter, but its attention is over {shown} channels, windows or other tokens"
    )


def why_changed(
    call: BlockCall, before: Any, after: Any, forward: Callable[[], Any], adapter: nn.Module, *, numbers_tokens: bool
) -> str:
    """Return why prompts that no token attends to change the output of a block.

    Args:
        call: Of the block, without prompts.
        before, after: The outputs without prompts and with them.
        forward: Runs the block with hidden prompts.
        adapter: Returns the prompts.
        numbers_tokens: The forward numbers something, as positions of tokens are.
    """
    if call.changes_input:
        return "changes the tokens that enter it in place (x += y), which are then no longer those that entered"
    x, y = logits_of(before), logits_of(after)
    if x.shape != y.shape:
        return (
            f"returns {tuple(y.shape)} with them and {tuple(x.shape)} without: it drops, pools or merges a share of "
            "its tokens"
        )
    if _depends_on_content(forward, adapter):
        return (
            "mixes all its tokens outside the attention weights (what the prompts contain reaches others though none "
            "attends to them), as pooling, merging, averaging or mixing heads does"
        )
    if numbers_tokens:
        return (
            "knows the positions of its tokens in a way that petune cannot extend to tokens without a position: it "
            "numbers them in its forward"
        )
    return "computes something else for its tokens as soon as prompts are among them, though none attends to these"


def why_without_effect(call: BlockCall) -> str:
    """Return why what prompts contain changes no other token, though attentions have them among their keys."""
    inputs = list(tensors_in((call.args, call.kwargs)))
    streams = [y for y in inputs[1:] if y.is_floating_point() and y.ndim == 3 and y.shape[-1] == inputs[0].shape[-1]]
    if streams:
        reason = f"it is called with {plural(len(streams) + 1, 'stream')} of tokens, and they enter the first"
    elif len(inputs) > 1:
        reason = "it is called with a mask that hides them, in a way that petune does not understand"
    else:
        reason = "its attention masks them, or what leaves it is not used"
    return f"has no token that reads them ({reason}), so they would do nothing"


def _depends_on_content(forward: Callable[[], Any], adapter: nn.Module) -> bool:
    """Return whether other content of hidden prompts changes the output."""
    outputs: list[Tensor] = []
    for seed in range(2):
        with random_prompts(adapter, seed):
            outputs.append(logits_of(forward()))
    return not outputs[0].is_meta and not torch.equal(outputs[0], outputs[1])
