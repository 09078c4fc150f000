"""Which number format is faster here is measured, since processors differ by a factor of a thousand."""

from __future__ import annotations

import math
import time
from functools import cache
from typing import Literal, get_args

import torch
from torch import nn

from petune.base.errors import ConfigError
from petune.training.config import Precision


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA, then MPS, then CPU.

    Raises:
        ConfigError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:N or mps and exist here; {name!r}: {reason}") from None
    return device


def choose_precision(wanted: Precision, device: torch.device) -> Literal["fp32", "tf32", "bf16"]:
    """`wanted`, or for `auto` bfloat16 where its matrix product is 1.5 times as fast as float32's.

    On a GPU float32 is what it says, convolutions included, and `tf32` lets products of it be rounded.

    Raises:
        ConfigError: There is no such format; or it is `tf32`, and the device is no NVIDIA GPU.
    """
    if wanted not in get_args(Precision):
        raise ConfigError(f"precision must be one of {', '.join(get_args(Precision))}, but is {wanted!r}")
    if wanted == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"precision tf32 is a way of NVIDIA's GPUs, but the device is {device.type}; use fp32 or bf16"
        )
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if wanted == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = wanted == "tf32"
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    return "bf16" if _bf16_speedup_on_cpu() >= 1.5 else "fp32"


def why_slow(precision: str, device: torch.device) -> str:
    """What to know of bfloat16 on a CPU without it: said when it was asked for, or comes from another machine's run.

    Returns:
        Empty where nothing is wrong.
    """
    if precision != "bf16" or device.type != "cpu" or (speedup := _bf16_speedup_on_cpu()) > 0.7:
        return ""
    return (
        f"a product in bfloat16 takes {1 / speedup:.2g} times as long as in float32 on this processor; "
        "precision auto or fp32 is faster here"
    )


@cache
def _bf16_speedup_on_cpu() -> float:
    """Of a product as a ViT has them; a small one tells that much sooner where bfloat16 is emulated.

    On an Intel Xeon with AMX the small one gave 1.5 to 2.1, at times less than `auto` asks for, the other 2.9 to 5.5.
    """
    small = _bf16_speedup_of(128, 384)
    return _bf16_speedup_of(256, 768) if small > 1 else small


def _bf16_speedup_of(rows: int, width: int) -> float:
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    pairs = {dtype: (torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)) for dtype in best}
    end = time.perf_counter() + 0.2
    for number in range(30):  # in turns, and the best of each: whatever else runs only ever adds to a time
        for dtype, (a, b) in pairs.items():
            start = time.perf_counter()
            a @ b
            if number:  # the first one prepares
                best[dtype] = min(best[dtype], time.perf_counter() - start)
        if number and time.perf_counter() > end:
            break
    return best[torch.float32] / best[torch.bfloat16]


def choose_attention(model: nn.Module, device: torch.device, precision: str) -> list[nn.Module]:
    """Switch timm's attention to plain matrix products where the fused kernel is slower.

    On CPU its backward in bfloat16 is: forward and backward of one attention layer took 2.4 times as long at 65
    tokens, 1.3 at 197 and 257, 1.2 at 577 (timm 1.0.31, torch 2.14, AMD EPYC with avx512_bf16, 2 cores). In float32
    it is faster from about 197 tokens on and as fast below, so it stays. A fixed rule and no timing: two runs of one
    configuration must use the same kernel to be equal to the bit.

    Returns:
        The modules that were switched.
    """
    slower = device.type == "cpu" and precision == "bf16"
    switched = [m for m in model.modules() if slower and getattr(m, "fused_attn", None) is True]
    for module in switched:
        module.fused_attn = False  # type: ignore[assignment]
    return switched
