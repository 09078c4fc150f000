"""Check that a faster forward computes the same as the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Step = tuple[Tensor, dict[str, Tensor]]


def same_logits(expected: Tensor, forward: Callable[[], Tensor]) -> bool:
    """Return whether `forward` gives the same bits; False as well if it cannot run.

    It fails where two number formats meet outside of autocast, or where the processor lacks a kernel for the sizes.
    """
    try:
        return torch.equal(forward(), expected)
    except RuntimeError:
        return False


def same_step(one: Callable[[], Tensor], other: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter]) -> bool:
    """Return whether two forwards give the same logits, bit for bit, and the same gradients up to rounding.

    The parameters are moved a little meanwhile, because one that starts at zero hides what it multiplies. Gradients
    are left for the caller to clear; buffers and random state are the caller's to restore.
    """
    with _moved(parameters):
        logits, grads = _step(one, parameters)
        other_logits, other_grads = _step(other, parameters)
    if not torch.equal(logits, other_logits) or grads.keys() != other_grads.keys():
        return False
    return all(torch.allclose(grad, other_grads[key], rtol=1e-4, atol=1e-7) for key, grad in grads.items())


@contextmanager
def _moved(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    values = {key: p.detach().clone() for key, p in parameters.items()}
    try:
        with torch.no_grad():
            for p in parameters.values():
                p.add_(torch.randn_like(p), alpha=0.02)
        yield
    finally:
        with torch.no_grad():
            for key, p in parameters.items():
                p.copy_(values[key])


def _step(forward: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter]) -> Step:
    torch.manual_seed(0)
    for p in parameters.values():
        p.grad = None
    logits = forward()
    logits.float().square().mean().backward()  # type: ignore[no-untyped-call]
    return logits.detach(), {key: p.grad for key, p in parameters.items() if p.grad is not None}
