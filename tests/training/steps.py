"""One training step, to be compared bit for bit with the same step computed in another way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import petune
from tests.tiny import X


def step(att: petune.Attachment, x: Tensor = X, bf16: bool = False) -> list[Tensor | None]:
    """Return logits and gradients."""
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = att.model(x)
    logits = getattr(out, "logits", out)
    logits.float().square().sum().backward()
    found = [logits.detach(), *(p.grad for p in att.parameters())]
    for p in att.parameters():
        p.grad = None
    return found


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    """Return whether two results of `step` are equal to the bit, and None in the same positions."""
    return all(
        x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True)
    )


def logits_of(model: nn.Module) -> Callable[[], Tensor]:
    """Return a function that computes logits under autocast, always the same ones."""

    def logits() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(0)
            return model(X)  # type: ignore[no-any-return]

    return logits
