"""Check after a backward that what should learn gets a gradient."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from petune.base.errors import DeadSite
from petune.base.text import plural
from petune.sites.routed import routed_parameters
from petune.sites.sites import Sites


def check_gradients(
    name: str,
    tuned: Mapping[str, nn.Parameter],
    head: Mapping[str, nn.Parameter],
    unfrozen: Collection[nn.Parameter],
    *,
    under_way: bool,
) -> None:
    """Check that every parameter has a gradient, and once training is under way that the method learns.

    Args:
        name: The attachment, for messages.
        tuned: The method's parameters, by key.
        head: The classifier's parameters, by key.
        unfrozen: The backbone's own parameters among `tuned`.
        under_way: Check too that not all gradients of `tuned` are zero.

    Raises:
        DeadSite: Some have no gradient, or all are zero.
    """
    without = {key for key, p in tuned.items() if p.grad is None}
    head_without = {key for key, p in head.items() if p.grad is None}
    if head_without == {*head}:  # a head may have layers that this loss, or any forward, does not use
        without |= head_without
    missing = missing_gradients(tuned, unfrozen, without)
    if missing:
        raise DeadSite(
            f"{plural(len(missing), 'parameter')} of {name} got no gradient, such as {', '.join(missing[:3])}: the "
            "output of the model does not depend on them. Use another method on this model"
        )
    # if a classifier that trains has no gradient either, everything is learned
    if under_way and tuned and (_learns(head) or not head) and not _learns(tuned):
        raise DeadSite(
            f"{name} does not learn: all gradients are zero ({plural(len(tuned), 'tensor')}). Check its options "
            "(a scale of 0, a dropout of 1), or use another method"
        )


def expected(
    tuned: Mapping[str, nn.Parameter], model: nn.Module, sites: Sites, *, may_lack: bool
) -> Mapping[str, nn.Parameter]:
    """Return the parameters that must have a gradient: all, or if `may_lack`, those that have one, if any does.

    A batch need not reach all experts of a router, so those of experts need none.
    """
    reached = {key: p for key, p in tuned.items() if p.grad is not None}
    if may_lack or len(reached) in (0, len(tuned)):
        return reached or tuned
    routed = routed_parameters(model, sites.input_spec, sites.block_modules())
    return {key: p for key, p in tuned.items() if key in reached or id(p) not in routed}


def missing_gradients(
    tuned: Mapping[str, nn.Parameter], unfrozen: Collection[nn.Parameter], without: set[str]
) -> list[str]:
    """Return the keys in `without` of parameters that should have got a gradient.

    A backbone may own parameters that its output never uses, such as DINOv2's mask token in transformers. If some of
    its own parameters have a gradient, the others need none.
    """
    backbone = {id(p) for p in unfrozen}
    own = {key for key, p in tuned.items() if id(p) in backbone}
    return sorted(without - own if own - without else without)


def _learns(parameters: Mapping[str, nn.Parameter]) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in parameters.values())
