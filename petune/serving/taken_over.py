"""Prove that a bank computes with an adapter what the model computes to which only this adapter is attached."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from petune.base.errors import AttachError
from petune.serving.bank_forward import BankForward
from petune.serving.bank_kind import AdapterKind, AdapterValues, Owner
from petune.serving.sharing_check import changed_values
from petune.sites.logits import max_difference, max_value

SCALES = (1.0, 0.1, 0.0)
"""Sizes of the changes of values that are tried until the logits are finite: an adapter may be zero in the file."""


@dataclass(frozen=True, eq=False)
class Alone:
    """The output of the model with one adapter, at the classifier to which it was attached.

    Attributes:
        values: The adapter's values, changed.
        logits: Of a few images.
    """

    values: AdapterValues
    logits: Tensor


def computed_alone(kind: AdapterKind, forward: BankForward) -> Alone:
    """Compute with the adapter of a kind that was just attached: it is enabled, at its own classifier."""
    original = kind.current_values(None)
    for scale in SCALES:
        values = changed_values(original, scale)
        try:
            kind.disable()
            kind.slots.put(values.tensors)
            kind.enable()
            logits = forward.trial_logits()
        except Exception:  # an adapter may not take any values
            if scale == SCALES[-1]:
                raise
            continue
        finally:
            kind.disable()
            kind.enable()
        if bool(logits.isfinite().all()):
            break
    return Alone(values, logits)


def check_taken_over(owner: Owner, alone: Alone, forward: BankForward) -> None:
    """Check that the bank computes the same: nothing that the method put on the model is left out.

    Raises:
        AttachError: It computes something else.
    """
    kind, values = owner
    assert kind is not None
    assert values is not None
    with forward.activated(Owner(kind, AdapterValues(alone.values.tensors, values.head))):
        logits = forward.trial_logits()
    allowed = 8 * torch.finfo(logits.dtype).eps * max_value(alone.logits)
    difference = max_difference(logits, alone.logits) if logits.shape == alone.logits.shape else float("inf")
    if difference > allowed:
        method = kind.attachment.method
        raise AttachError(
            f"an AdapterBank does not take over all that {method} puts on {forward.sites.model}: logits would differ "
            f"by {difference:.2g} from those with this adapter alone. Load it with petune.load, one at a time"
        )
