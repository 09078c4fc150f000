"""Measure FLOPs and memory, and record versions, machine and commit beside a number."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from petune.sites.forward import undisturbed

PACKAGES = ("petune", "torch", "torchvision", "timm", "peft", "numpy")


def forward_flops(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """FLOPs of one image's forward (a multiply-add counts two), by torch's counter."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(model.parameters())
    x = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:  # the counter would ask a parameter that is a module's input (a class token) for its history
        p.requires_grad_(False)
    try:  # the counter does not see fused attention on CPU, so it is switched to plain products
        with (
            undisturbed(model),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(x)
    finally:
        for p in trained:
            p.requires_grad_(True)
    return int(counter.get_total_flops())


class PeakMemory:
    """Peak memory since it was made: allocated on a CUDA device, else resident of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_resident_peak()

    def bytes(self) -> int:
        """The peak so far, in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if status.exists():
            line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _reset_resident_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the process's whole life
        return


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, device, threads and git state: what must stand beside a number for it to be trusted."""
    return {
        "versions": {name: installed_version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "git": git_state(),
        "argv": sys.argv[:1] and [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def installed_version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The name of the GPU or of the processor with its number of usable cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(row.split(":", 1) for row in info.read_text().splitlines() if ":" in row)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in named:
            family, model = (named.get(key, "?") for key in ("cpu family", "model"))
            return f"{named['model name']} (family {family}, model {model})"
    return platform.processor() or platform.machine()


@cache
def git_state() -> dict[str, Any] | None:
    """Return commit and dirtiness of petune's checkout at the first call: a process runs what it imported."""

    def git(*words: str) -> str:
        where = Path(__file__).parent
        done = subprocess.run(["git", *words], cwd=where, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != Path(__file__).resolve().parents[2]:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
