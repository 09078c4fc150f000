"""Verify the `mid` that petune found by silencing parts of a block: by numbers, not by the trace that it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import petune
from petune.sites.input_spec import Inputs
from petune.sites.site import Block, Site


def unproven_mids(model: nn.Module, sites: petune.Sites) -> list[str]:
    """Return the paths of blocks whose `mid` is not the stream that their MLP's output is added to.

    With the MLP silenced (or the attention too, if both run in parallel), the stream goes on unchanged: out of the
    block, as it is or scaled by a gate of each channel, or into the norm after the addition. If the block is no module,
    its exit is what is added: it is silent too. If the addition goes past attention and MLP together, the block's input
    is left, and `mid` must be the MLP's norm.
    """
    x = sites.input_spec.noise(2, seed=2)
    return [b.path for b in sites.blocks if {"mid", "mlp"} <= b.parts.keys() and not _is_stream(model, b, x)]


def _is_stream(model: nn.Module, block: Block, x: Inputs) -> bool:
    for roles in (("mlp",), ("mlp", "attn"), ("norm1",), ("norm2",)):
        if not block.parts.keys() >= set(roles):
            continue
        run = _run(model, block, x, [block.parts[role] for role in roles])
        reached = any(_close(run.mid, y) for y in run.later)
        if not block.is_module:
            return reached or bool((run.output == 0).all())
        if reached or _close(run.mid, run.output) or _is_gated(run.mid, run.output, block):
            return True
        if "norm2" in block.parts and block.mid.enter is block.norm2.enter:
            return _close(run.input, run.output)
    return False


def _is_gated(mid: Tensor, output: Tensor, block: Block) -> bool:
    """Return whether one factor for each channel makes the output from `mid` (EfficientViM mixes stream and MLP)."""
    if mid.shape != output.shape or block.mid.layout != block.layout:
        return False
    x, y = (z.movedim(1, -1).flatten(0, -2) if block.layout == "BCHW" else z.flatten(0, -2) for z in (mid, output))
    factors = (x * y).sum(0) / (x * x).sum(0)
    return bool((factors.abs() > 1e-3).all()) and torch.allclose(x * factors, y, atol=1e-4, rtol=1e-4)


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether both are equal in any layout: as rows of tokens, channels last or second."""
    if a.numel() != b.numel():
        return False
    pairs = ((s, t) for s in (a, a.movedim(1, -1)) for t in (b, b.movedim(1, -1)))
    return any(torch.allclose(s.flatten(), t.flatten(), atol=1e-4, rtol=1e-4) for s, t in pairs)


@dataclass
class _Run:
    """One forward with parts of a block silenced.

    Attributes:
        input, mid, output: What enters the block and `mid`, and what leaves the block.
        later: What enters modules of the block after the MLP.
        scales: Inputs and outputs of leaf modules, which may be scales of the stream.
        after_mlp: True between the MLP and the end of the block.
    """

    input: Tensor = field(default_factory=lambda: torch.empty(0))
    mid: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    later: list[Tensor] = field(default_factory=list)
    scales: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    after_mlp: bool = False


def _run(model: nn.Module, block: Block, x: Inputs, silent: list[Site]) -> _Run:
    run = _Run()

    def enter_block(module: nn.Module, args: Any, kwargs: Any) -> None:
        run.input = _first(args, kwargs)

    def enter_mid(module: nn.Module, args: Any, kwargs: Any) -> None:
        run.mid = _first(args, kwargs)

    def leave_mlp(module: nn.Module, args: Any, output: Any) -> None:
        run.after_mlp = True

    def enter_later(module: nn.Module, args: Any, kwargs: Any) -> None:
        if run.after_mlp and any(isinstance(v, Tensor) for v in (*args, *kwargs.values())):
            run.later.append(_first(args, kwargs))

    def leave_scale(module: nn.Module, args: Any, output: Any) -> None:
        if not list(module.children()) and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            run.scales.append((args[0].clone(), output.clone()))

    def leave_block(module: nn.Module, args: Any, output: Any) -> None:
        run.output = (output if isinstance(output, Tensor) else output[0]).clone()
        run.after_mlp = False

    def silence(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 0 if isinstance(output, Tensor) else (output[0] * 0, *output[1:])

    handles = [site.exit.register_forward_hook(silence) for site in silent]
    handles.append(block.enter.register_forward_pre_hook(enter_block, with_kwargs=True))
    handles.append(block.mid.enter.register_forward_pre_hook(enter_mid, with_kwargs=True))
    handles.append(block.mlp.exit.register_forward_hook(leave_mlp))
    if block.is_module:
        handles += [m.register_forward_pre_hook(enter_later, with_kwargs=True) for m in block.enter.modules()]
        handles += [m.register_forward_hook(leave_scale) for m in block.enter.modules()]
    handles.append(block.exit.register_forward_hook(leave_block))
    try:
        with torch.no_grad():
            x.call(model)
    finally:
        for handle in handles:
            handle.remove()
    # a stream that is scaled on its way to the addition: the scale's output stands for its input
    if any(_close(run.mid, entered) and _close(run.output, scaled) for entered, scaled in run.scales):
        run.later.append(run.mid)
    return run


def _first(args: Any, kwargs: Any) -> Tensor:
    return next(v.clone() for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
