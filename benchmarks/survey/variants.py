"""The slow walk: the places of every timm model there is, on the meta device."""

from __future__ import annotations

import time
from typing import Any

import timm
import torch

import petune


def walk() -> dict[str, Any]:
    """Print a line a variant; return counts, time, what failed, and whose blocks lack the residual stream."""
    begun, found = time.monotonic(), 0
    failed: dict[str, str] = {}
    without_mid: dict[str, str] = {}
    names = timm.list_models()
    for name in names:
        start = time.monotonic()
        try:
            blocks, lacking = see(name)
        except Exception as error:  # the walk goes on
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"{name:56s} failed: {failed[name]}", flush=True)
            continue
        found += blocks > 0
        if lacking:
            without_mid[name] = f"{lacking} of {blocks}"
        if blocks:
            print(f"{name:56s} {blocks} blocks, {lacking} without mid  {time.monotonic() - start:.1f} s", flush=True)
    return {
        "timm": timm.__version__,
        "variants": len(names),
        "with_attention": found,
        "time_s": round(time.monotonic() - begun),
        "failed": failed,
        "without_mid": without_mid,
    }


def see(name: str) -> tuple[int, int]:
    """How many blocks petune finds in one variant, and how many of them lack the stream between their halves."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=3)
    blocks = petune.find_sites(model).blocks
    return len(blocks), sum("mid" not in b.parts for b in blocks)
