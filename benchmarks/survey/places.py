"""The places that petune found, proven by switching parts of a block off: numbers, not the trace they came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import petune
from petune.sites import Block, Site


def unproven_mids(model: nn.Module, sites: petune.Sites) -> list[str]:
    """Blocks whose `mid` is not what the block returns when its MLP (and what runs beside it) is silent."""
    x = torch.randn(2, *sites.input_size, generator=torch.Generator().manual_seed(2))
    return [b.path for b in sites.blocks if b.mid is not None and b.mlp is not None and not _is_stream(model, b, x)]


def _is_stream(model: nn.Module, block: Block, x: Tensor) -> bool:
    mlp, norm, attn = block.mlp, block.norm2, block.attn
    assert mlp is not None
    silent = [[mlp], [mlp, attn], [norm]]  # pre-norm; parallel; norm after the MLP
    for sites in silent:
        if None in sites:
            continue
        mid, out, entered = _run(model, block, x, [s for s in sites if s is not None])
        if _close(mid, block.mid, out, block) or (norm is not None and _close(mid, block.mid, entered, norm)):
            return True
    return False


def _close(a: Tensor, a_site: Any, b: Tensor | None, b_site: Any) -> bool:
    if b is None:
        return False
    rows = [y.movedim(1, -1) if site.layout == "BCHW" else y for y, site in ((a, a_site), (b, b_site))]
    if rows[0].numel() != rows[1].numel():
        return False
    return torch.allclose(rows[0].reshape(rows[1].shape), rows[1], atol=1e-4, rtol=1e-4)


def _run(model: nn.Module, block: Block, x: Tensor, silent: list[Site]) -> tuple[Tensor, Tensor, Tensor | None]:
    """What enters `mid`, leaves the block and enters norm2, in a forward with the outputs of some sites zero."""
    seen: dict[str, Tensor] = {}

    def pre(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[name] = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)).clone()

        return hook

    def post(module: nn.Module, args: Any, output: Any) -> None:
        seen["out"] = (output if isinstance(output, Tensor) else output[0]).clone()

    def zero(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 0 if isinstance(output, Tensor) else (output[0] * 0, *output[1:])

    assert block.mid is not None
    handles = [site.exit.register_forward_hook(zero) for site in silent]
    handles += [
        block.mid.enter.register_forward_pre_hook(pre("mid"), with_kwargs=True),
        block.exit.register_forward_hook(post),
    ]
    if block.norm2 is not None:
        handles.append(block.norm2.enter.register_forward_pre_hook(pre("norm2"), with_kwargs=True))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen["mid"], seen["out"], seen.get("norm2")
