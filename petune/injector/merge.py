"""Fold adapters into the backbone's weights, and check that the model still computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from petune.adapters.fingerprint import plain_parts
from petune.base.errors import NotMergeable
from petune.injector.edit_log import EditLog, Placed
from petune.injector.hooks.base import After, Before
from petune.injector.hooks.torch_attention import Projection
from petune.injector.keys import named_parameters
from petune.injector.trainable import TrainableState
from petune.sites.logits import max_difference, max_value, synthetic_logits
from petune.sites.sites import Sites

MAX_CHANGE = 1e-3
"""Tolerated change of the logits, relative to the largest."""
MAX_CHANGE_IN_HALF = 5e-2
HALF = {torch.float16, torch.bfloat16}


def fold(model: nn.Module, sites: Sites, log: EditLog, state: TrainableState, name: str) -> None:
    """Fold the adapters into the weights, and disable them. If that fails, everything is as before.

    Args:
        model: The model.
        sites: Its sites.
        log: The attachment's edits; they are enabled.
        state: The model's.
        name: The attachment's name, for messages.

    Raises:
        NotMergeable: An adapter is not a change of weights, another attachment trains the same weights in place, or
            the folded model computes something else.
    """
    _check_are_stored(log, name)
    before = {key: t.detach().clone() for key, t in model.state_dict().items() if isinstance(t, Tensor)}
    expected = synthetic_logits(model, sites)
    try:
        _fold(model, log, name)
        _check_not_shared(model, log, state, name, before)
        log.set_enabled(False)
        largest = max(max_value(expected), torch.finfo(expected.dtype).tiny)
        change = max_difference(synthetic_logits(model, sites), expected) / largest
        if not change < (MAX_CHANGE_IN_HALF if expected.dtype in HALF else MAX_CHANGE):
            raise NotMergeable(
                f"{name} computes something else when folded: its output moves by {change:.2g}. The model may "
                "read these weights elsewhere, too: use the adapter unmerged. Of a method of your own, mend its merge",
                changes_output=True,
            )
    except BaseException:
        _restore(model, before)
        log.set_enabled(True)
        raise


def _check_are_stored(log: EditLog, name: str) -> None:
    """Check that the layers to fold into hold their weights, and do not compute them in each forward.

    Raises:
        NotMergeable: One computes its weight, so that the change would be lost.
    """
    edited = [*log.wrappers, *(site.exit for _, sites in log.placed for site in sites)]
    if not log.can_fold:
        return
    for module in {m for layer in edited for m in layer.modules()}:
        if is_parametrized(module) or isinstance(vars(module).get("weight"), Tensor):  # weight_norm's is an attribute
            raise NotMergeable(
                f"{name} cannot be merged into a {type(module).__name__} whose weight is computed from other tensors "
                "(a parametrization, weight_norm). Remove that before attach, with "
                "torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm, or use the adapter unmerged"
            )


def _fold(model: nn.Module, log: EditLog, name: str) -> None:
    """Fold the adapters.

    Raises:
        NotMergeable: An adapter is not a change of weights; or quantized weights do not take the change.
    """
    try:
        _fold_adapters(log, name)
    except (NotImplementedError, RuntimeError) as error:
        kinds = {type(p).__name__ for p in model.parameters() if type(p) is not nn.Parameter}
        if not kinds:
            raise
        raise NotMergeable(
            f"{name} cannot be merged into quantized weights ({', '.join(sorted(kinds))}): {error}. Merge before "
            "quantizing: attach and train on the model in full precision"
        ) from error


def _fold_adapters(log: EditLog, method: str) -> None:
    """Fold every adapter into the weights of its site. The caller undoes the edit, or restores the weights.

    Raises:
        NotMergeable: An adapter is not a change of weights; the message says why.
    """
    for holder, sites in log.placed:
        reason = getattr(holder.adapter, "why_not_mergeable", None)
        if reason is None and not callable(getattr(holder.adapter, "merge", None)):
            reason = "its adapter has no method merge(module)"
        if reason is None and (sites[-1].part is not None or isinstance(sites[-1].exit, Projection)):
            reason = "it changes a part of what a layer returns"
        if reason is None and not _multiplies_by_weight(sites[-1].exit):
            reason = f"{type(sites[-1].exit).__name__} multiplies by something else than its weight, such as 1 + weight"
        if reason:
            raise NotMergeable(f"{method} cannot be merged into the weights of {sites[-1].where}: {reason}")
    for merge in log.merges:
        merge()
    for holder, sites in _fold_order(log.placed, method):
        holder.adapter.merge(sites[-1].exit)  # type: ignore[operator]


def _multiplies_by_weight(module: nn.Module) -> bool:
    """Return whether a layer norm is g · x̂ + b with its weight as g; True for other modules."""
    if not isinstance(module, nn.LayerNorm) or not module.elementwise_affine:
        return True
    x = torch.linspace(-1, 1, module.normalized_shape[-1]).to(module.weight).expand(1, *module.normalized_shape)
    try:
        y = module.forward(x)
    except RuntimeError:  # it takes maps only, as LayerNorm2d
        return True
    return torch.allclose(y, nn.LayerNorm.forward(module, x), rtol=0.05, atol=0.05)


def _fold_order(placed: list[Placed], method: str) -> list[Placed]:
    """Return the adapters in the order in which folding them one by one gives what they compute together.

    What acts on a module's output is folded in the order in which it acts. What acts on its input is folded in reverse
    order: the module takes in the last one first, and what a parallel adapter reads first too.

    Raises:
        NotMergeable: There is no such order.
    """
    sorter: TopologicalSorter[int] = TopologicalSorter()
    by_module: dict[nn.Module, list[int]] = {}
    for index, (holder, sites) in enumerate(placed):
        sorter.add(index)
        for earlier in by_module.setdefault(sites[-1].exit, []):
            kinds = {type(placed[earlier].holder), type(holder)}
            if After in kinds and Before not in kinds:
                sorter.add(index, earlier)
            elif Before in kinds and After not in kinds:
                sorter.add(earlier, index)
        by_module[sites[-1].exit].append(index)
    try:
        return [placed[index] for index in sorter.static_order()]
    except CycleError:
        raise NotMergeable(f"{method} has adapters at one site that cannot be folded one by one") from None


@torch.no_grad()
def _restore(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Give the tensors their values back; quantized weights by their parts, because they may refuse to be copied to."""
    quantized = {key: t for key, t in before.items() if hasattr(t, "__tensor_flatten__")}
    model.load_state_dict({key: t for key, t in before.items() if key not in quantized}, strict=False)
    now = model.state_dict()
    for key, values in quantized.items():
        for (_, part), (_, old) in zip(plain_parts(key, now[key]), plain_parts(key, values), strict=True):
            part.copy_(old)


def _are_equal(tensor: Tensor, other: Tensor) -> bool:
    """Compare values; quantized ones by their parts, because they may refuse to be compared."""
    pairs = zip(plain_parts("", tensor), plain_parts("", other), strict=True)
    return all(torch.equal(part, old) for (_, part), (_, old) in pairs)


def _check_not_shared(
    model: nn.Module, log: EditLog, state: TrainableState, name: str, before: Mapping[str, Tensor]
) -> None:
    """Check that no other attachment would undo the fold when it restores its original values."""
    parameters = named_parameters(model)
    for key, tensor in model.state_dict().items():
        if key not in before or _are_equal(tensor, before[key]):
            continue
        other = state.values.trainer_of(key, parameters.get(key), other_than=log.label)
        if other is not None:
            raise NotMergeable(
                f"{name} cannot be folded into {key}, which {other} trains in place: the change would be lost when "
                f"{other} is disabled or detached. Merge or detach {other} first"
            )
