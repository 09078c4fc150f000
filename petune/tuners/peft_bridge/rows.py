"""One batch for several adapters: PEFT's LoRA takes the adapter of every row as an argument of each layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import petune


def set_rows(layers: Iterable[Any], adapter: str, rows: list[int] | None, batch_size: int) -> None:
    """Let an adapter act on some rows of the next batches.

    Args:
        layers: PEFT's layers that hold it.
        adapter: Its name inside PEFT.
        rows: Indices of the rows; None lifts the restriction.
        batch_size: Number of rows.
    """
    for layer in layers:
        rows_of: dict[str, list[int]] = layer.__dict__.setdefault("petune_rows", {})
        if rows is not None:
            if not rows_of:
                layer.petune_hook = layer.register_forward_pre_hook(_pass_adapter_names, with_kwargs=True)
            rows_of[adapter] = rows
            layer.petune_batch_size = batch_size
        elif rows_of.pop(adapter, None) is not None and not rows_of:
            layer.petune_hook.remove()


def _pass_adapter_names(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    num_rows = len(args[0])
    if num_rows != layer.petune_batch_size:
        raise petune.AttachError(
            f"a layer was called with {num_rows} rows for {layer.petune_batch_size} images. One batch for several "
            "adapters needs one row per image in every layer"
        )
    names = ["__base__"] * num_rows
    for adapter, rows in layer.petune_rows.items():
        for row in rows:
            names[row] = adapter
    return args, {**kwargs, "adapter_names": names}
