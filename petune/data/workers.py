"""Threads that prepare images, and the memory of their batches."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Result = TypeVar("Result")
_STARTING = threading.Lock()


CHUNKS_PER_THREAD = 4
"""Parts of a batch for each thread: few, because each costs time, and enough that no thread waits long at the end."""


@dataclass(frozen=True)
class ImageWorkers:
    """Threads that prepare images.

    Attributes:
        pool: The threads.
        count: How many there are.
    """

    pool: ThreadPoolExecutor
    count: int

    def start(
        self, function: Callable[[int], Result], count: int, after: Callable[[slice], None] = lambda _: None
    ) -> Callable[[], list[Result]]:
        """Let the threads call `function` with 0 … count - 1, after everything that was started before.

        Args:
            function: Called with one number at a time.
            count: How many numbers.
            after: Called with each part of the numbers, by the thread that called `function` with them.

        Returns:
            Waits for the results and returns them, or raises the first error, in order.
        """
        size = max(1, count // (CHUNKS_PER_THREAD * self.count))
        chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]

        def work(chunk: range) -> list[Result]:
            results = [function(number) for number in chunk]
            after(slice(chunk.start, chunk.stop))
            return results

        results = self.pool.map(work, chunks)
        return lambda: [result for part in results for result in part]


def one_ahead(started: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Yield the results of what `ImageWorkers.start` returns; the next one is started before a result is waited for.

    So threads that have no more to do for a batch begin with the next one.
    """
    waiting: deque[Callable[[], Result]] = deque()
    for finish in started:
        waiting.append(finish)
        if len(waiting) > 1:
            yield waiting.popleft()()
    if waiting:
        yield waiting.popleft()()


@contextmanager
def image_workers(count: int) -> Iterator[ImageWorkers]:
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
        try:
            yield ImageWorkers(pool, count)
        finally:
            pool.shutdown(cancel_futures=True)  # what nobody waits for any more


class BatchMemory:
    """Memory of batches that is used again when nothing refers to a batch any more.

    Linux hands out new memory page by page, filled with zeros. For a batch of 64 images of 224 pixels this takes a
    fifth of the time of the images themselves.

    Args:
        batch_size: Images of the largest batch.
        shape: Of an image.
    """

    MAX_ARRAYS = 4
    """One batch in use, one waiting for it, and two that are being filled."""

    def __init__(self, batch_size: int, shape: tuple[int, ...]) -> None:
        self.shape = (batch_size, *shape)
        self.arrays: list[NDArray[np.float32]] = []
        self.users: list[weakref.ref[Any]] = []

    def empty(self, count: int) -> Tensor:
        """Return room for `count` images, float32 (count, *shape)."""
        free = [number for number, user in enumerate(self.users) if user() is None]
        if not free and len(self.arrays) == self.MAX_ARRAYS:  # somebody keeps batches
            return torch.from_numpy(np.empty((count, *self.shape[1:]), np.float32))
        if not free:
            self.arrays.append(np.empty(self.shape, np.float32))  # NumPy asks Linux for large pages
            self.users.append(weakref.ref(self.arrays[-1][:0]))
            free = [len(self.arrays) - 1]
        view = self.arrays[free[0]][:count]
        self.users[free[0]] = weakref.ref(view)  # the tensor and all its views refer to this view
        return torch.from_numpy(view)
