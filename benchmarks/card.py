"""Name the GPU of a measurement, and what it can do."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import Any

import torch

DENSE_BF16_TFLOPS = {"B200": 2250.0, "H200": 989.0, "H100 80GB HBM3": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0}
"""Peak rate of dense bfloat16 products in the vendor's datasheet, by words of the card's name; others are not known."""


def describe_card(device: torch.device) -> dict[str, Any]:
    """Return name, driver, memory and versions of the card; of a CPU, what there is of them."""
    if device.type != "cuda":
        return {"name": "CPU", "driver": None, "memory_bytes": None, "peak_tflops": None, "cuda": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "driver": _driver(),
        "memory_bytes": properties.total_memory,
        "peak_tflops": peak_tflops(properties.name),
        "cuda": torch.version.cuda,
    }


def peak_tflops(card: str) -> float | None:
    """Return the peak rate of a card by its name, in which `L4` is a word and `L40` another one."""
    words = f" {card.replace('-', ' ')} "
    return next((rate for name, rate in DENSE_BF16_TFLOPS.items() if f" {name} " in words), None)


def commit_of(result: Mapping[str, Any]) -> str:
    """Return the commit that a result was measured at, for a page."""
    state = result["provenance"]["git"] or {}
    return f"commit {(state.get('commit') or 'unknown')[:7]}" + "+" * bool(state.get("dirty"))


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)
