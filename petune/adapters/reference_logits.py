"""What a model computes, told by its logits of one made-up image.

Tensors do not say everything: a backbone with another number of heads, another activation or another pooling has the
same ones, and so has a method whose package changed. Whoever loads an adapter must get what was saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import CheckpointError
from petune.injector.attachment import Attachment
from petune.injector.trainable import trainable_state_of
from petune.sites.logits import synthetic_logits

KEPT = 8  # logits: another backbone moves all of them
BITS, BITS_IN_HALF = 8, 6
"""Every layer's output is rounded to these, to learn how far other machines' rounding may move the logits.

bfloat16 has 8 bits, TF32 11 and float32 24.
"""
DRAWS = 3  # of two logits, rounding may by chance move neither


def behaviour(attachment: Attachment) -> dict[str, Any] | None:
    """The first logits of the test image, and how far they may move.

    Returns:
        Plain data; None where it cannot be told: another attachment is on, another task's classifier is in place, the
        weights are spread over processes, a logit is not finite.
    """
    if attachment.fingerprint is not None or not _alone(attachment):
        return None
    with _on(attachment):
        logits = _logits(attachment)
        moved = max(_moved_by_rounding(attachment, logits, fewer) / 2**fewer for fewer in range(DRAWS))
    largest = float(logits.abs().max())
    if not math.isfinite(largest + moved):
        return None
    allowed = max(moved, 1e-5 * largest)
    return {"logits": [_short(logit) for logit in logits.tolist()], "tolerance": _short(allowed)}


def max_abs_diff(attachment: Attachment, saved: Mapping[str, Any]) -> float:
    """How far the logits of the test image are from the saved ones; 0.0 within the tolerance, or beside others.

    Args:
        attachment: With the saved tensors in place.
        saved: Of `behaviour`.

    Raises:
        CheckpointError: `saved` is nothing that `behaviour` returned.
    """
    if not _alone(attachment):
        return 0.0
    here = _logits(attachment)
    try:
        logits, tolerance = torch.tensor(saved["logits"], dtype=torch.float64), float(saved["tolerance"])
        if logits.shape != here.shape:
            raise ValueError(f"there are {logits.numel()} logits, and {here.numel()} of this model")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"behaviour must be as petune wrote it, but cannot be read: {error!r}") from None
    moved = float((here - logits).abs().max())
    return 0.0 if moved <= tolerance else moved


def _alone(attachment: Attachment) -> bool:
    """Whether the logits can be those of this attachment and no other, under its own classifier."""
    ledger, head = trainable_state_of(attachment.model), attachment.sites.parts.get("head")
    here = {*attachment.model.modules()}
    if ledger is None or (head is not None and not here.issuperset(head.modules)):  # a task of AdapterBank, not in use
        return False
    return not any(claim.on for name, claim in ledger.claims.items() if name != attachment.edit_log.name)


@contextmanager
def _on(attachment: Attachment) -> Iterator[None]:
    was = attachment.enabled
    attachment.enable()
    try:
        yield
    finally:
        if not was:
            attachment.disable()


def _moved_by_rounding(attachment: Attachment, logits: Tensor, fewer_bits: int) -> float:
    """How far the logits move where what every layer but the classifier gives is rounded."""
    model, head = attachment.model, attachment.sites.parts.get("head")
    half = next(model.parameters()).dtype in {torch.float16, torch.bfloat16}
    left_out = {m for bound in head.modules for m in bound.modules()} if head is not None else set()
    layers = [m for m in model.modules() if m not in left_out and not any(True for _ in m.children())]
    hook: Callable[..., Any] = partial(_round, (BITS_IN_HALF if half else BITS) - fewer_bits)
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        return float((_logits(attachment) - logits).abs().max())
    finally:
        for handle in handles:
            handle.remove()


def _round(bits: int, module: nn.Module, args: Any, out: Any) -> Tensor | None:
    """`out` to so many bits: what is added and taken off again takes the lower ones with it."""
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return None
    exact = out.double()
    shifted = exact * (2.0 ** (53 - bits) + 1)
    return (shifted - (shifted - exact)).to(out.dtype)


def _logits(attachment: Attachment) -> Tensor:
    return synthetic_logits(attachment.model, attachment.sites, 1).flatten()[:KEPT].double().cpu()


def _short(value: float) -> float:
    return float(f"{value:.6g}")
