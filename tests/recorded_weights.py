"""The files of tests/golden/v0 have random weights, drawn on a processor with AVX-512; others round differently."""

from __future__ import annotations

import pytest
import torch

CAPABILITY = "AVX512"

needs_recorded_weights = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != CAPABILITY,
    reason=f"random weights drawn from the same seed differ in their last bits on a processor without {CAPABILITY}",
)
