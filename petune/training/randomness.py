"""Random numbers of a training step, derived from (seed, step), so that a resumed run draws the same ones."""

from __future__ import annotations

import numpy as np
import torch


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Return a seed that differs for every (seed, step), and for each process of a group."""
    words = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def seed_generators(device: torch.device, seed: int, step: int, rank: int = 0) -> None:
    """Seed the generators that dropout and drop path draw from in this step."""
    number = step_seed(seed, step, rank)
    if device.type == "cpu":  # torch.manual_seed tells every accelerator, with a stack trace each: 2 ms per step
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)
