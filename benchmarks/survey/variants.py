"""The slow walk: the places of every timm model there is, on the meta device."""

from __future__ import annotations

import time

import timm
import torch

import petune


def walk() -> None:
    """Print a line a variant, and in the end those whose blocks are none or lack what methods need."""
    strange: list[str] = []
    names = timm.list_models()
    for name in names:
        start = time.monotonic()
        line = see(name)
        if line is not None:
            print(f"{name:56s} {line}  {time.monotonic() - start:.1f} s", flush=True)
            if "failed" in line or "without mid" in line:
                strange.append(f"{name}: {line}")
    print(f"\n{len(names)} variants; these lack something:", *strange, sep="\n")


def see(name: str) -> str | None:
    """What petune finds in one variant; None where it has no attention."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=3)
        sites = petune.find_sites(model)
    except Exception as error:  # the walk goes on
        return f"failed: {type(error).__name__}: {str(error)[:200]}"
    if not sites.blocks:
        return None
    lacking = sum(b.mid is None for b in sites.blocks)
    return f"{len(sites.blocks)} blocks" + (f", {lacking} without mid" if lacking else "")
