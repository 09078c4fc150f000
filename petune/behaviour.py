"""What a model computes, told by its scores of one made-up picture.

Tensors do not say everything: a backbone with another number of heads, another activation or another pooling has the
same ones, and so has a method whose package changed. Whoever loads an adapter must get what was saved.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petune.attachment import Attachment
from petune.ledger import ledger_of
from petune.probe import look

KEPT = 8  # scores: another backbone moves all of them
TOLERANCE = 0.01
"""Of the largest score. On vit_nano float32 in another order moves 1e-6, TF32 1e-3, QuickGELU 5 %, other heads 14 %."""
TOLERANCE_IN_HALF = 0.1  # bfloat16 moves 1 %
NUDGE = 1e-4  # of the picture: what moves the scores much more than that has choices in its forward, as of tokens

_KNOWN: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def behaviour(attachment: Attachment) -> dict[str, Any] | None:
    """The first scores of the test picture, and how far they may move.

    Returns:
        Plain data; None where it cannot be told: the attachment is off, another one is on too, the weights are spread
        over processes, a score is not finite.
    """
    if attachment.fingerprint is not None or not _alone(attachment):
        return None
    scores = _scores(attachment)
    largest = float(scores.abs().max())
    if not math.isfinite(largest):
        return None
    moved = float((_scores(attachment, NUDGE) - scores).abs().max())
    allowed = max(_tolerance(attachment.model) * largest, 10 * moved)
    return {"scores": [_rounded(score) for score in scores.tolist()], "tolerance": _rounded(allowed)}


def moved_by(attachment: Attachment, saved: Mapping[str, Any], kind: str) -> float:
    """How far the scores of the test picture are from the saved ones; 0.0 where that is within the tolerance.

    Args:
        attachment: With the saved tensors in place.
        saved: Of `behaviour`.
        kind: Backbone, method and options; once one adapter of a kind was right on a model, others are.
    """
    known = _KNOWN.setdefault(attachment.model, set())
    if kind in known or not _alone(attachment):
        return 0.0
    scores = torch.tensor(saved["scores"], dtype=torch.float64)
    moved = float((_scores(attachment) - scores).abs().max())
    if not moved <= max(saved["tolerance"], _tolerance(attachment.model) * float(scores.abs().max())):
        return moved
    known.add(kind)
    return 0.0


def _alone(attachment: Attachment) -> bool:
    ledger = ledger_of(attachment.model)
    return ledger is not None and [name for name, claim in ledger.claims.items() if claim.on] == [attachment.edit.name]


def _scores(attachment: Attachment, nudge: float = 0.0) -> Tensor:
    return look(attachment.model, attachment.sites, 1, nudge).flatten()[:KEPT].double().cpu()


def _tolerance(model: nn.Module) -> float:
    first = next(model.parameters())
    half = first.dtype in {torch.float16, torch.bfloat16} or torch.is_autocast_enabled(first.device.type)
    return TOLERANCE_IN_HALF if half else TOLERANCE


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
