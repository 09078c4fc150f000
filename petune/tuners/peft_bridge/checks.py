"""Refuse what PEFT would do wrong without a word: layers that it leaves out, or that would have no effect."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

import petune
from petune.tuners.peft_bridge.layer import active_adapters, adapters_in, nested_layers, peft_layers
from petune.tuners.peft_bridge.nesting import ONE_AT_A_TIME, ONE_IN_A_LAYER

ONE_TYPE = "Attach one PEFT type at a time, or several of the same"


def refuse_bypassed(model: nn.Module, kind: str, uncalled: list[nn.Module]) -> None:
    """Refuse layers inside an enabled adapter that reads their weights, such as HRA's, instead of calling them.

    Args:
        model: The model.
        kind: The type to attach, for the message.
        uncalled: The layers that the forward does not call.
    """
    for path, outer in peft_layers(model).items():
        if outer.get_base_layer() in uncalled and active_adapters(outer):
            raise petune.AttachError(
                f"{path} has an active adapter that reads the layer's weight without calling it, so {kind} would do "
                f"nothing there. {ONE_TYPE} that can be enabled together, or disable the other first"
            )


def refuse_other_parameters(model: nn.Module, config: Any) -> None:
    """Refuse an adapter of parameters, q, k and v in one, next to one of other parameters, which PEFT cannot do.

    Args:
        model: The model.
        config: PEFT's, of the adapter to attach.
    """
    own = {*(getattr(config, "target_parameters", None) or ())}
    for other in getattr(model, "peft_config", {}).values():
        theirs = {*(getattr(other, "target_parameters", None) or ())}
        if own and theirs and own != theirs:
            named = f"{', '.join(sorted(theirs)[:2])}{', …' if len(theirs) > 2 else ''}"
            raise petune.AttachError(
                f"a LoRA of {named} is on the model, and PEFT takes a further one of "
                "the same parameters only: torch.nn.MultiheadAttention has q, k and v in one. Use the "
                "same blocks and targets for both, detach the other one, or give each a copy of the model"
            )


def refuse_left_out(model: nn.Module, layers: dict[str, Any], name: str, wanted: list[str], before: set[str]) -> None:
    """See that PEFT has wrapped every layer that it was given, and no layer of another type.

    Args:
        model: The model.
        layers: The layers that hold the adapter, by path.
        name: The adapter's name inside PEFT.
        wanted: Paths of the layers that it was given.
        before: Paths of PEFT's layers from before.
    """
    missing = [path for path in wanted if path not in layers]
    kinds = {adapter: config.peft_type for adapter, config in getattr(model, "peft_config", {}).items()}
    mixed = [
        path
        for path, layer in layers.items()
        if {kinds.get(adapter) for adapter in adapters_in(layer)} != {kinds.get(name)}
    ]
    if layers and not missing and not mixed:
        return
    occupied = [path for path in (*mixed, *missing) if path in before]
    reason = f"{occupied[0]} holds another PEFT type already" if occupied else "they are of a kind it does not know"
    raise petune.AttachError(
        f"PEFT has left out {', '.join((mixed or missing)[:3]) or 'all'} of the layers that it was given "
        f"({len(wanted)}): {reason}. {ONE_TYPE}"
    )


def refuse_classifier(sites: petune.Sites, layers: dict[str, Any]) -> None:
    """Refuse targets that include the classifier, which trains as it is."""
    classifier = sites.parts.get("head")
    inside = {id(m) for module in (classifier.modules if classifier else ()) for m in module.modules()}
    for path, layer in layers.items():
        if {id(layer), id(layer.get_base_layer())} & inside:
            raise petune.AttachError(
                f"target_modules includes {path}, a layer of the classifier, which trains as it is. Leave it out"
            )


def refuse_uncalled(edit: petune.Edit, layers: dict[str, Any]) -> None:
    """Refuse layers that the forward never calls."""
    called = _called_without_hooks(edit, layers.values())
    if len(called) < len(layers):
        called |= edit.routed(layers.values())
    for path, layer in layers.items():
        if layer not in called:
            raise petune.AttachError(
                f"PEFT's layer would do nothing: the forward of {edit.sites.model} never calls {path}; its weight is "
                "read without calling it. Leave it out of target_modules"
            )


def refuse_fewer_factors(layers: dict[str, Any], config: Any, name: str) -> None:
    """Refuse a BOFT with fewer factors than its config says: PEFT trains one where its CUDA extension is missing."""
    if config.peft_type.value != "BOFT":
        return
    wanted = config.boft_n_butterfly_factor
    num_factors = next(len(layer.boft_R[name]) for layer in layers.values())
    if num_factors != wanted:
        raise petune.AttachError(
            f"boft_n_butterfly_factor={wanted} needs PEFT's CUDA extension, which could not be built here; PEFT would "
            f"train {num_factors} and save {wanted}. Use boft_n_butterfly_factor=1, or a machine with CUDA and ninja"
        )


def refuse_together(model: nn.Module, kind: str, own: set[Any], name: str) -> None:
    """Refuse active adapters at one layer if one of them may read the layer's weight without the change by the other.

    Args:
        model: The model.
        kind: The type of `own`.
        own: The attachment's layers.
        name: PEFT's name of the attachment's adapter.
    """
    kinds = {adapter: config.peft_type.value.lower() for adapter, config in getattr(model, "peft_config", {}).items()}
    for path, outer in peft_layers(model).items():
        nested = list(nested_layers(outer))
        if not own & {*nested}:
            continue
        others = {kinds.get(adapter) for layer in nested if layer not in own for adapter in active_adapters(layer)}
        if kind in ONE_IN_A_LAYER and any(active_adapters(layer) - {name} for layer in nested if layer in own):
            others |= {kind}
        if others == {kind} and kind in ONE_AT_A_TIME | ONE_IN_A_LAYER:
            raise petune.AttachError(
                f"{path} has an active adapter of {kind} already, and only one can be enabled at a time. Disable the "
                "other first"
            )
        if others - {kind}:
            raise petune.AttachError(
                f"{path} has an active adapter of another PEFT type than {kind}. {ONE_TYPE}, or disable the other first"
            )


def _called_without_hooks(edit: petune.Edit, layers: Iterable[Any]) -> set[Any]:
    """Return the layers that a forward calls. Hooks would see more calls: they keep torch from its fused kernels."""
    called: set[Any] = set()
    replaced = {layer: vars(layer).get("forward") for layer in layers}  # accelerate replaces a forward too
    for layer in replaced:
        layer.forward = functools.partial(_record_call, layer.forward, layer, called)
    try:
        edit.called([edit.model])
    finally:
        for layer, forward in replaced.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward
    return called


def _record_call(forward: Callable[..., Any], layer: Any, called: set[Any], *args: Any, **kwargs: Any) -> Any:
    called.add(layer)
    return forward(*args, **kwargs)
