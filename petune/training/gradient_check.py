"""The gradient check of a training step, also under dropout that skips whole modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from petune.injector.attachment import Attachment
from petune.injector.gradients import expected, missing_gradients


def check_step_gradients(
    att: Attachment, params: Mapping[str, nn.Parameter], backward: Callable[[], object], *, under_way: bool
) -> None:
    """Check that everything learns; in eval mode, if this step's dropout may have skipped whole modules.

    Args:
        att: What trains.
        params: Everything that trains, by key. Their gradients are the same afterward.
        backward: Computes the gradients of this step's batch again.
        under_way: See `Attachment.check_gradients`.

    Raises:
        DeadSite: See `Attachment.check_gradients`.
    """
    without = {key for key, p in params.items() if p.grad is None}
    if not without or not _missing(att, without):
        att.check_gradients(under_way=under_way)
        return
    gradients = [p.grad for p in params.values()]
    for p in params.values():
        p.grad = None
    att.train(False)
    try:
        backward()
        att.check_gradients(under_way=under_way)
    finally:
        att.train()
        for p, gradient in zip(params.values(), gradients, strict=True):
            p.grad = gradient


def _missing(att: Attachment, without: set[str]) -> list[str]:
    tuned = expected(att.tuned, att.model, att.sites, may_lack=att.tuner.may_lack_gradients)
    return missing_gradients(tuned, att.edit_log.unfrozen, without & tuned.keys())
