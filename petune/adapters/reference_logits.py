"""Reference logits: the model's output for a synthetic image, saved with an adapter and compared when it is loaded.

Tensors do not tell everything. A backbone with another number of heads, activation or pooling has the same ones, and so
has a method whose package changed. The features that enter the head are compared, too: a classifier of zeros returns
the same logits for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import CheckpointError
from petune.base.text import plural
from petune.sites.forward import tensors_in
from petune.sites.hooked import removed_after
from petune.sites.logits import synthetic_logits
from petune.sites.sites import Sites

NUM_LOGITS = 8
"""Number of saved logits and of saved features; another backbone changes all of them."""
MANTISSA_BITS = 8
MANTISSA_BITS_IN_HALF = 6
"""Every layer's output is rounded to so many bits, to estimate how far rounding on other machines moves the logits.

bfloat16 has 8 bits, TF32 11 and float32 24.
"""
BACKBONE_TOLERANCE = 2e-6
"""Largest difference between features of one backbone, as a part of the largest one; otherwise the logits decide."""
NUM_ROUNDINGS = 3
"""One rounding may happen to move neither of two logits."""
FLOAT32_SHARE = 2.0**-9
"""The share of the tolerance that rounding in float32 may take up: it is as rounding layers to 17 bits.

Measured on eight ViTs: processors and kernels differ by a quarter of it at most, tanh GELU by three to ten times it.
"""


@dataclass(frozen=True)
class Difference:
    """The difference between a model's logits, or the features that enter its head, and the saved ones.

    Attributes:
        kind: `logits` or `features`.
        max_abs: The largest absolute difference.
        largest: The largest absolute value that was saved.
        tolerance: The difference that rounding in any number format explains.
        rounding: The difference that rounding explains, if the number format is as it was when the adapter was saved.
    """

    kind: str
    max_abs: float
    largest: float
    tolerance: float
    rounding: float


def reference_logits(model: nn.Module, sites: Sites) -> dict[str, Any] | None:
    """Return the first logits of a synthetic image, some features before the head, and how far rounding may move them.

    Returns:
        `{"logits": [...], "tolerance": x, "features": {"values": [...], "tolerance": x, "shape": [...]},
        "number_format": "cpu float32"}`, without features that cannot be seen; None if a value is not finite.
    """
    exact, shape = _outputs(model, sites)
    tolerances = dict.fromkeys(exact, 0.0)
    for fewer in range(NUM_ROUNDINGS):
        rounded, _ = _rounded_outputs(model, sites, fewer)
        for kind in exact.keys() & rounded.keys():
            shift = float((rounded[kind] - exact[kind]).abs().max()) / 2**fewer
            tolerances[kind] = max(tolerances[kind], shift, 1e-5 * _largest(exact[kind]))
    if not all(math.isfinite(_largest(exact[kind]) + tolerances[kind]) for kind in exact):
        return None
    saved = {kind: [_with_digits(9, x) for x in values.tolist()] for kind, values in exact.items()}
    reference = {"logits": saved["logits"], "tolerance": _with_digits(6, tolerances["logits"])}
    if "features" in saved:
        features = {"values": saved["features"], "tolerance": _with_digits(6, tolerances["features"])}
        reference["features"] = {**features, "shape": shape}
    return {**reference, "number_format": _number_format(model)}


def backbone_features(model: nn.Module, sites: Sites) -> list[float] | None:
    """Return the first values that enter the classifier for a synthetic image, with nothing enabled.

    They tell whether adapters belong to one backbone that computes the same, without a forward: see `AdapterBank`.

    Returns:
        None if a value is not finite, or the classifier is not a single module that is called with a tensor.
    """
    head = sites.parts.get("head")
    if head is None or not head.is_module:
        return None
    entered: list[Tensor] = []

    def keep(module: nn.Module, args: Any) -> None:
        entered.extend(x.detach() for x in args[:1] if isinstance(x, Tensor))

    handle = head.enter.register_forward_pre_hook(keep)
    with removed_after([handle]):
        synthetic_logits(model, sites, 1)
    values = entered[0].flatten()[:NUM_LOGITS].double().cpu() if entered else torch.tensor([math.nan])
    return [_with_digits(9, value) for value in values.tolist()] if bool(values.isfinite().all()) else None


def have_same_features(features: Any, others: Any) -> bool:
    """Return True if two results of `backbone_features` are of one backbone; False if that is not known."""
    try:
        x, y = (torch.tensor(values, dtype=torch.float64) for values in (features, others))
    except (TypeError, ValueError, RuntimeError):  # an older file has none
        return False
    return x.shape == y.shape and float((x - y).abs().max()) <= BACKBONE_TOLERANCE * float(x.abs().max())


def largest_difference(model: nn.Module, sites: Sites, saved: Mapping[str, Any]) -> Difference:
    """Return the difference between what the model computes for the synthetic image and the saved values.

    Args:
        model: With the saved adapter in place.
        sites: The model's sites.
        saved: From `reference_logits`.

    Returns:
        That of logits or features, whichever rounding explains less.

    Raises:
        CheckpointError: `saved` has another form.
    """
    current, shape = _outputs(model, sites)
    try:
        number_format = saved.get("number_format")
        has_same_format = number_format is not None and number_format == _number_format(model)
        parts = {"logits": (saved["logits"], saved["tolerance"])}
        features = saved.get("features")
        if features is not None and features["shape"] == shape:  # a newer library may pool inside of the head
            parts["features"] = features["values"], features["tolerance"]
        differences = [
            _difference(
                kind, current[kind], torch.tensor(values, dtype=torch.float64), float(tolerance), has_same_format
            )
            for kind, (values, tolerance) in parts.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"reference_logits cannot be read: {error!r}. Save the adapter again") from None
    return max(differences, key=lambda d: (d.max_abs > d.tolerance, d.max_abs / max(d.rounding, 1e-30)))


def _difference(kind: str, current: Tensor, saved: Tensor, tolerance: float, has_same_format: bool) -> Difference:
    if saved.shape != current.shape:
        raise ValueError(f"saved for {plural(saved.numel(), 'value')} of {kind}, and this model has {current.numel()}")
    largest = _largest(saved)
    rounding = max(tolerance * FLOAT32_SHARE, 5e-6 * largest) if has_same_format else tolerance
    max_abs = float((current - saved).abs().max())
    return Difference(
        kind, max_abs if math.isfinite(max_abs) else math.inf, largest, tolerance, min(rounding, tolerance)
    )


def _number_format(model: nn.Module) -> str | None:
    """Return a name for the number format if rounding in it is small and the same on all machines; else None.

    On GPUs, TF32 may be in use, also in layers that do not tell.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    is_float32 = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return "cpu float32" if is_float32 and torch.get_float32_matmul_precision() == "highest" else None


def _rounded_outputs(model: nn.Module, sites: Sites, fewer_bits: int) -> tuple[dict[str, Tensor], list[int]]:
    """Return `_outputs` when the output of every layer but the classifier is rounded."""
    is_half = next(model.parameters()).dtype in {torch.float16, torch.bfloat16}
    in_head = sites.head_modules()
    layers = [m for m in model.modules() if m not in in_head and not any(True for _ in m.children())]
    bits = (MANTISSA_BITS_IN_HALF if is_half else MANTISSA_BITS) - fewer_bits
    hook: Callable[..., Any] = partial(_rounded, bits)
    handles = [layer.register_forward_hook(hook) for layer in layers]
    with removed_after(handles):
        return _outputs(model, sites)


def _rounded(bits: int, module: nn.Module, args: Any, out: Any) -> Tensor | None:
    """Round `out` to `bits` mantissa bits (Veltkamp splitting)."""
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return None
    exact = out.double()
    shifted = exact * (2.0 ** (53 - bits) + 1)
    return (shifted - (shifted - exact)).to(out.dtype)


def _outputs(model: nn.Module, sites: Sites) -> tuple[dict[str, Tensor], list[int]]:
    """Return the first logits of a synthetic image; some features that enter the head, if it is a module; their shape.

    The features are evenly spread over the tensor.
    """
    entering: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not entering:
            entering.extend(t.detach().clone() for t in tensors_in((args, kwargs)) if t.is_floating_point())

    head = sites.parts.get("head")
    handle = head.enter.register_forward_pre_hook(keep, with_kwargs=True) if head is not None else None
    try:
        logits = synthetic_logits(model, sites, 1)
    finally:
        if handle is not None:
            handle.remove()
    finite = logits[~logits.isinf()]  # of masked words they are infinite
    outputs = {"logits": (finite if finite.numel() else logits.flatten())[:NUM_LOGITS].double().cpu()}
    if not entering or not entering[0].numel():
        return outputs, []
    features = entering[0].flatten()
    stride = max(1, features.numel() // NUM_LOGITS)
    outputs["features"] = features[::stride][:NUM_LOGITS].double().cpu()
    return outputs, [*entering[0].shape]


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _with_digits(digits: int, value: float) -> float:
    return float(f"{value:.{digits}g}")
