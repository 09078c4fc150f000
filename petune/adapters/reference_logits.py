"""Reference logits: the model's output for a synthetic image, saved with an adapter and compared when it is loaded.

Tensors do not tell everything. A backbone with another number of heads, activation or pooling has the same ones, and so
has a method whose package changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import CheckpointError
from petune.base.text import plural
from petune.sites.logits import synthetic_logits
from petune.sites.site import Sites

NUM_LOGITS = 8
"""Number of saved logits; another backbone changes all of them."""
MANTISSA_BITS = 8
MANTISSA_BITS_IN_HALF = 6
"""Every layer's output is rounded to so many bits, to estimate how far rounding on other machines moves the logits.

bfloat16 has 8 bits, TF32 11 and float32 24.
"""
NUM_ROUNDINGS = 3
"""One rounding may happen to move neither of two logits."""


def reference_logits(model: nn.Module, sites: Sites) -> dict[str, Any] | None:
    """Return the first logits of a synthetic image, and how far rounding may move them.

    Returns:
        `{"logits": [...], "tolerance": x}`; None if a logit is not finite.
    """
    logits = _logits(model, sites)
    shifts = [_shift_by_rounding(model, sites, logits, fewer) / 2**fewer for fewer in range(NUM_ROUNDINGS)]
    largest = float(logits.abs().max())
    if not math.isfinite(largest + max(shifts)):
        return None
    tolerance = max(*shifts, 1e-5 * largest)
    return {"logits": [_six_digits(logit) for logit in logits.tolist()], "tolerance": _six_digits(tolerance)}


def max_abs_diff(model: nn.Module, sites: Sites, saved: Mapping[str, Any]) -> float:
    """Return the largest difference between the logits of the synthetic image and the saved ones.

    Args:
        model: With the saved adapter in place.
        sites: The model's sites.
        saved: From `reference_logits`.

    Returns:
        0.0 if the difference is within the saved tolerance.

    Raises:
        CheckpointError: `saved` has another form.
    """
    current = _logits(model, sites)
    try:
        logits = torch.tensor(saved["logits"], dtype=torch.float64)
        tolerance = float(saved["tolerance"])
        if logits.shape != current.shape:
            raise ValueError(f"saved for {plural(logits.numel(), 'logit')}, and this model has {current.numel()}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"reference_logits cannot be read: {error!r}. Save the adapter again") from None
    difference = float((current - logits).abs().max())
    return 0.0 if difference <= tolerance else difference


def _shift_by_rounding(model: nn.Module, sites: Sites, logits: Tensor, fewer_bits: int) -> float:
    """Return how far the logits move if the output of every layer but the classifier is rounded."""
    head = sites.parts.get("head")
    is_half = next(model.parameters()).dtype in {torch.float16, torch.bfloat16}
    in_head = {m for bound in head.modules for m in bound.modules()} if head is not None else set()
    layers = [m for m in model.modules() if m not in in_head and not any(True for _ in m.children())]
    bits = (MANTISSA_BITS_IN_HALF if is_half else MANTISSA_BITS) - fewer_bits
    hook: Callable[..., Any] = partial(_rounded, bits)
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        return float((_logits(model, sites) - logits).abs().max())
    finally:
        for handle in handles:
            handle.remove()


def _rounded(bits: int, module: nn.Module, args: Any, out: Any) -> Tensor | None:
    """Round `out` to `bits` mantissa bits (Veltkamp splitting)."""
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return None
    exact = out.double()
    shifted = exact * (2.0 ** (53 - bits) + 1)
    return (shifted - (shifted - exact)).to(out.dtype)


def _logits(model: nn.Module, sites: Sites) -> Tensor:
    return synthetic_logits(model, sites, 1).flatten()[:NUM_LOGITS].double().cpu()


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")
