"""Threads that prepare images: torch computes on one core in each, and as before everywhere else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from petune.data.workers import image_workers


def test_only_workers_compute_on_one_core() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with image_workers(4) as pool, ThreadPoolExecutor(1) as other, image_workers(2):
            assert set(pool.map(lambda _: torch.get_num_threads(), range(40))) == {1}
            assert torch.get_num_threads() == 3
            assert other.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
