"""Threads that prepare images."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_STARTING = threading.Lock()


@contextmanager
def image_workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Start threads in each of which torch computes on one core.

    By default each of them would compute on all cores, with threads that wait for each other most of the time.
    `torch.set_num_threads` holds for the thread that calls it, and for threads that use torch for the first time
    afterwards. Here it holds for no thread but the workers.

    Args:
        count: Number of threads.
    """
    ready = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # torch sets a thread up at its first use; it would undo an earlier change
        torch.set_num_threads(1)
        ready.wait()

    with ThreadPoolExecutor(count, initializer=start) as pool:
        with _STARTING:
            num_threads = torch.get_num_threads()
            for _ in range(count):
                pool.submit(int)  # no thread is idle before all are ready, so each call starts one
            ready.wait()
            torch.set_num_threads(num_threads)
        yield pool
