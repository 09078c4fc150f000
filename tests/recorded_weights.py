"""The files of tests/golden/v0 have random weights, drawn on an Intel processor with AVX-512; others round differently.

PyTorch's truncated normal values come from Intel's MKL, which takes other code on processors of other makers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

CAPABILITY, VENDOR = "AVX512", "GenuineIntel"


def _is_such_a_processor() -> bool:
    cpus = Path("/proc/cpuinfo")
    return torch.backends.cpu.get_cpu_capability() == CAPABILITY and cpus.exists() and VENDOR in cpus.read_text()


needs_recorded_weights = pytest.mark.skipif(
    not _is_such_a_processor(),
    reason="random weights from the same seed differ in their last bits on processors other than Intel's with AVX-512",
)
