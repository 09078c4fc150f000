"""Devices and number formats."""

from __future__ import annotations

import platform
import sys
from typing import get_args

import torch
from torch import nn

from petune.base.errors import ConfigError
from petune.training.config import NumberFormat, Precision


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is CUDA, then MPS, then CPU.

    Raises:
        ConfigError: This machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition("Expected one of")[0].strip() or "PyTorch has no such type"
        raise ConfigError(f"no such device: {name!r} ({reason}). Use auto, cpu, cuda, cuda:N or mps") from None
    return device


def choose_precision(wanted: Precision, device: torch.device) -> NumberFormat:
    """Return `wanted`; for `auto`, bfloat16 where the device computes it fast: always the same on one machine.

    Raises:
        ConfigError: There is no such format, or it is `tf32` and the device is not an NVIDIA GPU.
    """
    if wanted not in get_args(Precision):
        raise ConfigError(f"no such precision: {wanted!r}. Use one of {', '.join(get_args(Precision))}")
    if wanted == "tf32" and device.type != "cuda":
        raise ConfigError(f"precision tf32 needs an NVIDIA GPU, but the device is {device.type}. Use fp32 or bf16")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    return "bf16" if has_fast_bf16() else "fp32"


def set_float32_products(precision: NumberFormat, device: torch.device) -> None:
    """Tell PyTorch how exact float32 is on a GPU: fully, convolutions included; with `tf32` products are rounded.

    PyTorch keeps this for the process.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"


def autocast(device: torch.device, precision: NumberFormat) -> torch.autocast:
    """Return the context of forward passes in this number format."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def precision_of_run(recorded: object, device: torch.device) -> NumberFormat:
    """Return the format that a run recorded; float32 where this device cannot compute in it, or only emulates it."""
    formats: tuple[NumberFormat, ...] = get_args(NumberFormat)
    wanted = next((name for name in formats if name == recorded), None)
    if wanted is None:
        return choose_precision("auto", device)
    is_emulated = wanted == "bf16" and choose_precision("auto", device) != "bf16"
    return "fp32" if is_emulated or (wanted == "tf32" and device.type != "cuda") else wanted


def precision_note(wanted: Precision, precision: NumberFormat, device: torch.device) -> str:
    """Say which format `auto` took, or warn of bfloat16 where a CPU emulates it; an empty string otherwise."""
    emulates = device.type == "cpu" and not has_fast_bf16()
    if precision == "bf16" and emulates:
        return "bfloat16 is slow on this processor, which has no instructions for it. Use precision auto or fp32"
    if wanted != "auto":
        return ""
    reason = ", because this processor has no instructions for bfloat16" if emulates else ""
    return f"precision auto: {'bfloat16' if precision == 'bf16' else 'float32'}{reason}"


def has_fast_bf16() -> bool:
    """Return whether this processor has instructions for products in bfloat16, and PyTorch uses them.

    Nothing is timed: on a busy machine one process then took bfloat16 and the next one float32. Processors with these
    instructions were 1.5 to 5.5 times as fast with them, those without up to a thousand times slower.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return sys.platform == "linux" and check is not None and bool(check())
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(bool(check()) for check in checks if check is not None)


def choose_attention(model: nn.Module, device: torch.device, precision: str) -> list[nn.Module]:
    """Switch timm's attention to plain matrix products where the fused kernel is slower.

    That is in bfloat16 on a CPU: forward and backward of one attention layer took 2.4 times as long with the fused
    kernel at 65 tokens, 1.3 at 197 and 257, 1.2 at 577 (timm 1.0.31, torch 2.14, AMD EPYC with avx512_bf16, 2 cores).
    In float32 it is at least as fast. The rule is fixed, not measured, because two runs of one configuration must use
    the same kernel to be equal to the bit.

    Returns:
        The modules that were switched.
    """
    if device.type != "cpu" or precision != "bf16":
        return []
    switched = [m for m in model.modules() if getattr(m, "fused_attn", None) is True]
    for module in switched:
        module.fused_attn = False  # type: ignore[assignment]
    return switched
