"""The places that petune found, proven by switching parts of a block off: numbers, not the trace they came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import petune
from petune.sites.site import Block, Site


def unproven_mids(model: nn.Module, sites: petune.Sites) -> list[str]:
    """Blocks whose `mid` is not the stream that their MLP's output is added to.

    With the MLP silent (or, where they run in parallel, the attention too), the stream goes on as it is: out of the
    block, or into the norm behind the addition. Of a block that is no module the exit is the addend: it is silent too.
    Of one whose addition goes past attention and MLP together, what entered is left, and `mid` must be the MLP's norm.
    """
    x = torch.randn(2, *sites.input_size, generator=torch.Generator().manual_seed(2))
    return [b.path for b in sites.blocks if {"mid", "mlp"} <= b.parts.keys() and not _is_stream(model, b, x)]


def _is_stream(model: nn.Module, block: Block, x: Tensor) -> bool:
    for roles in (("mlp",), ("mlp", "attn"), ("norm1",), ("norm2",)):
        if not block.parts.keys() >= set(roles):
            continue
        entered, mid, out, later = _run(model, block, x, [block.parts[role] for role in roles])
        if not block.is_module:
            return bool((out == 0).all()) or any(_close(mid, y) for y in later)
        if any(_close(mid, y) for y in (out, *later)):
            return True
        if "norm2" in block.parts and block.mid.enter is block.norm2.enter:
            return _close(entered, out)
    return False


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal, whatever the layout: as rows of tokens, channels last or second."""
    if a.numel() != b.numel():
        return False
    turned = (a, a.movedim(1, -1)), (b, b.movedim(1, -1))
    return any(torch.allclose(s.flatten(), t.flatten(), atol=1e-4, rtol=1e-4) for s in turned[0] for t in turned[1])


def _run(model: nn.Module, block: Block, x: Tensor, silent: list[Site]) -> tuple[Any, ...]:
    """What enters block and `mid`, what leaves the block, what enters modules behind the MLP; some outputs are zero."""
    seen: dict[str, Tensor] = {}
    later: list[Tensor] = []
    scales: list[tuple[Tensor, Tensor]] = []

    def first(args: Any, kwargs: Any) -> Tensor | None:
        return next((v.clone() for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)

    def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["in"] = first(args, kwargs)  # type: ignore[assignment]

    def mid(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["mid"] = first(args, kwargs)  # type: ignore[assignment]

    def left(module: nn.Module, args: Any, output: Any) -> None:
        seen["mlp"] = torch.ones(())

    def behind(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = first(args, kwargs)
        if "mlp" in seen and x is not None:
            later.append(x)

    def scaled(module: nn.Module, args: Any, output: Any) -> None:
        """A stream that is scaled on its way to the addition: what leaves the scale stands for what entered."""
        if not list(module.children()) and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            scales.append((args[0].clone(), output.clone()))

    def out(module: nn.Module, args: Any, output: Any) -> None:
        seen["out"] = (output if isinstance(output, Tensor) else output[0]).clone()
        seen.pop("mlp", None)  # what follows is another block's

    def zero(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 0 if isinstance(output, Tensor) else (output[0] * 0, *output[1:])

    handles = [site.exit.register_forward_hook(zero) for site in silent]
    handles.append(block.enter.register_forward_pre_hook(entered, with_kwargs=True))
    handles.append(block.mid.enter.register_forward_pre_hook(mid, with_kwargs=True))
    handles.append(block.mlp.exit.register_forward_hook(left))
    if block.is_module:
        handles += [m.register_forward_pre_hook(behind, with_kwargs=True) for m in block.enter.modules()]
        handles += [m.register_forward_hook(scaled) for m in block.enter.modules()]
    handles.append(block.exit.register_forward_hook(out))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if any(_close(seen["mid"], x) and _close(seen["out"], y) for x, y in scales):
        later.append(seen["mid"])
    return seen["in"], seen["mid"], seen["out"], later
