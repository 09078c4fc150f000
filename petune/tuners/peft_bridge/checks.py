"""Refuse what PEFT would do wrong without a word: layers that it leaves out, or that would have no effect."""

from __future__ import annotations

from typing import Any

from torch import nn

import petune
from petune.tuners.peft_bridge.layer import active_adapters, adapters_in, nested_layers, peft_layers

SHARED_PROJECTIONS = {"FROD", "RANDLORA", "VERA"}
"""Types whose projections PEFT keeps in the first adapter, for all of them."""

ONE_TYPE = "Attach one PEFT type at a time, or several of the same"


def refuse_shared_projections(model: nn.Module, config: Any) -> None:
    """Refuse a second adapter of a type that shares its projections."""
    kind = config.peft_type
    others = [other.peft_type for other in getattr(model, "peft_config", {}).values()]
    if kind.value in SHARED_PROJECTIONS and kind in others:
        raise petune.AttachError(
            f"only one adapter of {kind.value.lower()} is possible on a model, because PEFT keeps the projections of "
            "all in the first one. Detach the first, or use lora"
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
        f"PEFT has left out {', '.join((mixed or missing)[:3]) or 'all'} of the {len(wanted)} layers that it was "
        f"given: {reason}. {ONE_TYPE}"
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
    called = edit.called(layers.values())
    for path, layer in layers.items():
        if layer not in called:
            raise petune.AttachError(
                f"PEFT's layer would do nothing: the forward of {edit.sites.model} never calls {path}; its weight is "
                "read without calling it. Leave it out of target_modules"
            )


def refuse_nested(model: nn.Module, kind: str, own: set[Any]) -> None:
    """Refuse active layers of two types around each other: one may read the weight past the other.

    Args:
        model: The model.
        kind: The type of `own`, for the message.
        own: The attachment's layers.
    """
    for path, outer in peft_layers(model).items():
        nested = list(nested_layers(outer))
        others_active = any(active_adapters(layer) for layer in nested if layer not in own)
        if own & {*nested} and others_active:
            raise petune.AttachError(
                f"{path} has an active adapter of another PEFT type than {kind}. {ONE_TYPE}, or disable the other first"
            )
