"""Find where prompts enter a block: after its prefix tokens, or only in its attention; refuse other blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from petune.base.errors import AttachError
from petune.sites.site import Block, Site
from petune.sites.sites import Sites


@dataclass(frozen=True)
class PromptSlot:
    """Position of prompts: `num_prompts` of them at `index`, among `num_tokens` others."""

    index: int
    num_prompts: int
    num_tokens: int


def enters_attention_only(block: Block, sites: Sites) -> bool:
    """Return whether prompts enter the attention of a block, and not the block.

    They do if the block is not one module, lays its tokens out as an image, attends in windows, or convolves outside
    its attention. The result is the same as for prompts that enter the block and leave it at its end. Blocks of a kind
    that attends in windows do so too where one window holds the whole image, as in the last stage of Swin.
    """
    if "attn" not in block.parts or not block.attn.is_module:
        return False
    in_windows = any(b.num_windows > 1 and type(b.enter) is type(block.enter) for b in (block, *sites.all_blocks))
    plain = block.is_module and block.layout == "BNC" and not in_windows
    return not plain or bool(_convolutions(block.enter))


def refuse_obstacles(block: Block, sites: Sites) -> None:
    """Check that the structure of a block lets prompts in.

    Raises:
        AttachError: It does not; the message says why.
    """
    inside = enters_attention_only(block, sites)
    if not block.is_module and not inside:
        raise prompts_refused(block, sites, "is not a module of its own that they could enter and leave")
    entered = block.attn if inside else block
    if entered.layout == "BCHW" or (entered.layout != "BNC" and not inside):
        raise prompts_refused(block, sites, f"lays its tokens out as an image ({entered.layout})")
    convolutions = _convolutions(entered.enter)
    if convolutions:
        raise prompts_refused(block, sites, f"convolves over the image ({convolutions[0]})")


def prompts_refused(
    block: Site, sites: Sites, reason: str, advice: str = "Use a method without prompts, such as adaptformer"
) -> AttachError:
    """Return the error that says why a block takes no prompts."""
    return AttachError(f"{block.path} of {sites.model} cannot take prompts: it {reason}. {advice}")


def _convolutions(module: nn.Module) -> list[str]:
    """Return the names of convolutions that mix neighbors, but those of adapters that are disabled."""
    disabled = {m for holder in module.modules() if _is_disabled(holder) for m in holder.modules()}
    modules = [(name, m) for name, m in module.named_modules() if m not in disabled]
    named = [(name, m) for name, m in modules if isinstance(m, nn.Conv1d | nn.Conv2d)]
    return [name or "its own" for name, conv in named if any(k > 1 for k in conv.kernel_size)]


def _is_disabled(module: nn.Module) -> bool:
    return getattr(module, "is_petune_module", False) is True and getattr(module, "enabled", True) is False
