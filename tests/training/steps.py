"""One training step, to be compared bit by bit with the same step done otherwise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import petune
from tests.tiny import X


def step(att: petune.Attachment, x: Tensor = X, bf16: bool = False) -> list[Tensor | None]:
    """Scores and gradients."""
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = att.model(x)
    scores = getattr(out, "logits", out)
    scores.float().square().sum().backward()
    found = [scores.detach(), *(p.grad for p in att.parameters())]
    for p in att.parameters():
        p.grad = None
    return found


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    """Whether they are equal to the bit, and absent in the same places."""
    return all(
        x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True)
    )


def scores_of(model: nn.Module) -> Callable[[], Tensor]:
    """Gives the scores under autocast, always the same ones."""

    def scores() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(0)
            return model(X)  # type: ignore[no-any-return]

    return scores
