"""Measure how long `find_sites` takes on ViT-B, and how much memory it needs besides the weights.

    python benchmarks/sites.py          # on one core of a loaded 2-core machine: 0.13 s of processor time, 0.6 MB on
                                        # top of the model's 346 MB (2026-11-25, torch 2.14)

The forward runs on the meta device, which copies no weight. Linux only: peak memory is read from /proc.
"""

from __future__ import annotations

import time
from pathlib import Path

import timm
import torch

import petune


def main() -> None:
    """Print time and memory of five calls."""
    torch.set_num_threads(1)
    model = timm.create_model("vit_base_patch16_224", pretrained=False)
    petune.find_sites(timm.create_model("test_vit", pretrained=False))  # imports what is imported on first use
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _memory_mb("VmRSS")
    for _ in range(5):
        cpu_start, start = time.process_time(), time.perf_counter()
        petune.find_sites(model)
        cpu_seconds, seconds = time.process_time() - cpu_start, time.perf_counter() - start
        print(f"{cpu_seconds:.2f} s of processor time, {seconds:.2f} s of wall time")
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    print(f"{_memory_mb('VmHWM') - before:.1f} MB on top of {weights:.0f} MB of weights")


def _memory_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
