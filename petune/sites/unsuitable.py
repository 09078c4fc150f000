"""Models that petune cannot read as they are: advice that names why, and what to attach to instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from petune.base.author import adapter_that_raised, forward_of, is_authors, line_of
from petune.base.errors import AttachError
from petune.base.text import plural
from petune.sites.input_size import frames_of
from petune.sites.site import Block, Site
from petune.sites.trace import Trace

PACKED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")
"""Packages of layers whose weights are no parameters but packed for int8 kernels."""

MAX_REASON = 160
"""Characters of what a library of quantized weights says, which lists all types of all arguments."""


def refuse_packed(model: nn.Module) -> None:
    """Check that a model in which no blocks or no head were found is not quantized by torch.ao.

    Raises:
        AttachError: It is.
    """
    packed = [(path, m) for path, m in model.named_modules() if type(m).__module__.startswith(PACKED)]
    if packed:
        path, module = packed[0]
        raise AttachError(
            f"{len(packed)} layers of {type(model).__name__}, such as {path} ({type(module).__name__}), were quantized "
            "by torch.ao, which hides their weights from PyTorch. Attach to a model that torchao has quantized "
            "(quantize_ with Int8WeightOnlyConfig), or train first and quantize after merge()"
        )


def refuse_scripted(model: nn.Module) -> None:
    """Check that no part of a model was compiled by torch.jit: its modules take no hooks, by which forwards are seen.

    Raises:
        AttachError: One is.
    """
    scripted = next((path for path, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise AttachError(
            f"{scripted or 'the whole model'} of {type(model).__name__} was compiled by torch.jit, so it takes no "
            "hooks. Build the model with the plain module, and compile after merge()"
        )


def refuse_uninitialized(model: nn.Module) -> None:
    """Check that all parameters and buffers of a model have a shape: those of a lazy layer get it in its first forward.

    Raises:
        AttachError: Some have none.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    without = [key for key, tensor in tensors if is_lazy(tensor)]
    if without:
        layer = type(model.get_submodule(without[0].rpartition(".")[0])).__name__
        raise AttachError(
            f"{plural(len(without), 'tensor')} of {type(model).__name__}, such as {without[0]} ({layer}), have no "
            "shape before the first forward. Call the model once on what it takes, then attach"
        )


def why_no_blocks(trace: Trace) -> str:
    """Return what was seen of attention in a forward without blocks, for messages."""
    mixing = [op for op in trace.attention_ops if op.many_queries]
    if not mixing:
        return "no tokens attend to others in its forward, by a softmax over tokens"
    callers = list(dict.fromkeys(op.call.path for op in mixing))
    where = ", ".join(path or "the model's own forward" for path in callers[:3])
    return (
        f"its tokens attend to each other in {where}, which is not a module that adds one attention, or one and an "
        "MLP, to its tokens. Put each block into a module of its own"
    )


def why_all_in_head(blocks: Sequence[Block], head: Site) -> str:
    """Return why a model with blocks has none to edit: they are inside of its head, for messages."""
    return (
        f"its blocks, such as {blocks[0].where}, are inside of its head ({head.where}), which trains as a whole. To "
        "edit them, name the layers that predict alone with head="
    )


def advice_for(model: nn.Module) -> str:
    """Return what to do if the forward of a model fails on an image."""
    config: Any = getattr(model, "config", None)
    towers = _towers(model, config)
    if towers:
        return (
            f"It has a tower for images and one for text. Attach to the one for images: {towers}; or to both, with "
            "example=dict(input_ids=…, pixel_values=…), what the model takes"
        )
    if frames_of(model) is not None:
        return "It takes videos. Pass one as it takes them: example=torch.zeros(1, frames, channels, height, width)"
    return (
        "If that is not its size, pass input_size=(channels, height, width); if it takes anything else than images, "
        "example= with what it takes"
    )


def why_method_fails(model: nn.Module, error: Exception) -> str:
    """Return why the forward of a model fails with a method attached, and what to do, for messages."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    encoders = [path for path, m in model.named_modules() if getattr(m, "use_nested_tensor", False)]
    if encoders and "ested" in reason:
        return (
            f"{encoders[0]} packs tokens with a padding mask into a nested tensor, which the method cannot read. "
            f"Set model.{encoders[0]}.use_nested_tensor = False before attaching"
        )
    quantized = quantized_kind(model)
    if not quantized:
        return _why_adapter_fails(error, reason)
    shown = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}…"
    return (
        f"its weights are quantized ({quantized}), and not every method can compute with those. Use "
        f"base_precision=auto, or another method, such as lora or adaptformer. The reason: {shown}"
    )


def _why_adapter_fails(error: Exception, reason: str) -> str:
    adapter, line = adapter_that_raised(error), line_of(error)
    place = line if adapter is None else line or forward_of(adapter)
    where = f"{reason}{place}" if adapter is None else f"the adapter {adapter.__name__} raises {reason}{place}"
    is_own = is_authors(error) or place != line
    advice = "Mend it, or use another method on this model" if is_own else "Use another method on this model"
    return f"{where}. {advice}"


def quantized_kind(model: nn.Module) -> str:
    """Return the class of a model's quantized weights, which are tensors of a class of their own; empty without any."""
    return next((type(p).__name__ for p in model.parameters() if is_quantized(p)), "")


def is_quantized(p: Tensor) -> bool:
    """Tell whether a weight is a tensor of a class of its own that holds others; a sharded one does not count."""
    return hasattr(p, "__tensor_flatten__") and not hasattr(p, "full_tensor")


def _towers(model: nn.Module, config: Any) -> str:
    """Return the name of the image tower of a model with two; empty for another model."""
    if getattr(config, "vision_config", None) is None or getattr(config, "text_config", None) is None:
        return ""
    towers = [f"model.{name}" for name, _ in model.named_children() if name.startswith(("vision", "visual"))]
    return towers[0] if towers else ""
