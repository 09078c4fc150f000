"""Devices and number formats. Which format is faster is measured: processors differ by a factor of a thousand."""

from __future__ import annotations

import math
import time
from functools import cache
from typing import get_args

import torch
from torch import nn

from petune.base.errors import ConfigError
from petune.training.config import NumberFormat, Precision

MIN_BF16_SPEEDUP = 1.5
"""`auto` takes bfloat16 on a CPU if its matrix product is this many times as fast as that of float32."""
SLOW_BF16 = 0.7
MIN_ROUNDS = 4


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
    """Return `wanted`; for `auto`, bfloat16 where it is faster.

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
    return "bf16" if bf16_speedup_on_cpu() >= MIN_BF16_SPEEDUP else "fp32"


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


def precision_note(wanted: Precision, precision: NumberFormat, device: torch.device) -> str:
    """Say that `auto` took bfloat16, or warn of it where a CPU emulates it; an empty string otherwise."""
    if precision != "bf16":
        return ""
    if device.type != "cpu" or (speedup := bf16_speedup_on_cpu()) > SLOW_BF16:
        return "precision auto: bfloat16 is faster on this device, and used" if wanted == "auto" else ""
    return (
        f"bfloat16 is slow on this processor: a matrix product takes {1 / speedup:.2g} times as long as in float32. "
        "Use precision auto or fp32"
    )


@cache
def bf16_speedup_on_cpu() -> float:
    """Measure how many times as fast as in float32 a matrix product of a ViT is in bfloat16.

    A small product is measured first: it shows much sooner that bfloat16 is emulated. On an Intel Xeon with AMX the
    small one gave 1.5 to 2.1, sometimes less than `auto` asks for, the large one 2.9 to 5.5.
    """
    small = _bf16_speedup(rows=128, width=384)
    return _bf16_speedup(rows=256, width=768) if small > 1 else small


def _bf16_speedup(rows: int, width: int) -> float:
    """Time both formats in turns on one thread, and compare the best of each.

    Other load only ever adds time to one thread. Two that wait for each other gave ratios from 0.06 to 84 on a busy
    machine where one gave 3.7 to 3.8: the same command then trained in another format.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _best_ratio(rows, width)
    finally:
        torch.set_num_threads(threads)


def _best_ratio(rows: int, width: int) -> float:
    best_s = {torch.float32: math.inf, torch.bfloat16: math.inf}
    operands = {
        dtype: (torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)) for dtype in best_s
    }
    end = time.perf_counter() + 0.2
    for number in range(30):
        for dtype, (a, b) in operands.items():
            start = time.perf_counter()
            a @ b
            if number:  # the first one warms up
                best_s[dtype] = min(best_s[dtype], time.perf_counter() - start)
        if number >= MIN_ROUNDS and time.perf_counter() > end:
            break
    return best_s[torch.float32] / best_s[torch.bfloat16]


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
