"""Costs of a run (FLOPs, peak memory), and the conditions under which they were measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from petune.base.text import plural
from petune.sites.file_values import read_layer_by_layer
from petune.sites.forward import black_image
from petune.sites.input_spec import InputSpec
from petune.sites.undisturbed import undisturbed

PACKAGES = ("petune", "torch", "torchvision", "timm", "peft", "numpy")


def forward_flops(model: nn.Module, spec: InputSpec) -> int:
    """Return the FLOPs of the forward pass of one image, by torch's counter; a multiply-add counts as two.

    Args:
        model: On any device; nothing about it changes.
        spec: What the model takes.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    image = black_image(model, spec)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:  # the counter fails on parameters that are inputs of a module, such as a class token
        p.requires_grad_(False)
    try:  # the counter misses fused attention on CPU, so plain matrix products are used
        with (
            undisturbed(model),
            read_layer_by_layer(model),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            image.call(model)
    finally:
        for p in trained:
            p.requires_grad_(True)
    return int(counter.get_total_flops())


class PeakMemory:
    """Peak memory since this object was created: allocated memory on CUDA, else resident memory of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_resident_peak()

    def bytes(self) -> int:
        """Return the peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status")
        if status.exists():
            line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        import resource  # Unix only

        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _reset_resident_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not permitted: the peak then counts from the start of the process
        return


def provenance(device: torch.device) -> dict[str, Any]:
    """Return versions, device, threads, git state and command, for the record of a measurement."""
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
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with its number of usable cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {plural(cores or 1, 'core')}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(row.split(":", 1) for row in info.read_text().splitlines() if ":" in row)
        values = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in values:
            family, model = values.get("cpu family", "?"), values.get("model", "?")
            return f"{values['model name']} (family {family}, model {model})"
    return platform.processor() or platform.machine()


def record_git_state() -> None:
    """Look at the commit now: that of the code that trains, whatever is committed meanwhile."""
    git_state()


@cache
def git_state() -> dict[str, Any] | None:
    """Return commit and dirty flag of petune's checkout, as of the first call; None if petune is not a checkout.

    Cached because a process runs the code that it imported, whatever is committed later.
    """
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=package, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
