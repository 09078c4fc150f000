"""Find the sites of every timm model on the meta device; this takes most of an hour."""

from __future__ import annotations

import time
from typing import Any

import timm
import torch

import petune


def walk() -> dict[str, Any]:
    """Print a line per variant; return counts, time, failures, and the variants whose blocks have no `mid`."""
    start = time.monotonic()
    with_attention = 0
    failed: dict[str, str] = {}
    without_mid: dict[str, str] = {}
    names = timm.list_models()
    for name in names:
        start_of_one = time.monotonic()
        try:
            num_blocks, num_without = count_blocks(name)
        except Exception as error:  # the walk goes on
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"{name:56s} failed: {failed[name]}", flush=True)
            continue
        with_attention += num_blocks > 0
        if num_without:
            without_mid[name] = f"{num_without} of {num_blocks}"
        if num_blocks:
            seconds = time.monotonic() - start_of_one
            print(f"{name:56s} {num_blocks} blocks, {num_without} without mid  {seconds:.1f} s", flush=True)
    return {
        "timm": timm.__version__,
        "variants": len(names),
        "with_attention": with_attention,
        "time_s": round(time.monotonic() - start),
        "failed": failed,
        "without_mid": without_mid,
    }


def count_blocks(name: str) -> tuple[int, int]:
    """Return how many blocks petune finds in a variant, and how many of them have no `mid`."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=3)
    blocks = petune.find_sites(model).blocks
    return len(blocks), sum("mid" not in block.parts for block in blocks)
