"""Threads that prepare images: torch computes on one core in each, and as before everywhere else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from petune.data.workers import BatchMemory, ImageWorkers, image_workers, one_ahead


def test_only_workers_compute_on_one_core() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with image_workers(4) as workers, ThreadPoolExecutor(1) as other, image_workers(2):
            assert set(workers.start(lambda _: torch.get_num_threads(), 40)()) == {1}
            assert torch.get_num_threads() == 3
            assert other.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_workers_return_results_in_order() -> None:
    with image_workers(3) as workers:
        counts = (0, 1, 5, 100)
        results = list(one_ahead(workers.start(str, count) for count in counts))
        assert results == [[str(number) for number in range(count)] for count in counts]


def test_the_next_batch_is_started_before_one_is_waited_for_and_no_other() -> None:
    second, batches = threading.Event(), list[int]()

    def prepare(batch: int, number: int) -> bool:
        """Let the first image wait for the second batch."""
        if batch == 1:
            second.set()
        return second.wait(5) if (batch, number) == (0, 0) else True

    def started(workers: ImageWorkers) -> Iterator[Callable[[], list[bool]]]:
        for batch in range(5):
            batches.append(batch)
            yield workers.start(partial(prepare, batch), 2)

    with image_workers(2) as workers:
        for number, results in enumerate(one_ahead(started(workers))):
            assert results == [True, True]
            assert len(batches) == min(number + 2, 5)


def test_an_error_is_raised_at_its_batch_and_no_thread_goes_on() -> None:
    before, calls = threading.active_count(), list[int]()

    def prepare(batch: int, number: int) -> int:
        calls.append(batch)
        if batch == 1 and number > 2:
            raise OSError(f"image {number}")
        time.sleep(0.001)
        return batch

    with pytest.raises(OSError, match="image 3"), image_workers(2) as workers:  # noqa: PT012
        batches = one_ahead(workers.start(partial(prepare, batch), 100) for batch in range(4))
        assert set(next(batches)) == {0}
        next(batches)
    assert threading.active_count() == before
    assert calls.count(2) < 100
    assert 3 not in calls


def test_memory_of_a_batch_is_used_again_only_when_nothing_refers_to_it() -> None:
    memory = BatchMemory(4, (3, 2, 2))
    address = memory.empty(4).data_ptr()
    view = memory.empty(4).fill_(1)[1:, 0]
    assert view.data_ptr() == address + 3 * 4 * 4
    kept = [view, *(memory.empty(3).fill_(number) for number in range(2, 7))]
    assert [float(x.flatten()[0]) for x in kept] == [1, 2, 3, 4, 5, 6]
    assert [x.shape for x in kept[1:]] == [(3, 3, 2, 2)] * 5
    freed = kept.pop(0).data_ptr()
    del view
    assert memory.empty(1).data_ptr() == freed - 3 * 4 * 4
    graph = torch.ones(1, requires_grad=True) * memory.empty(4).fill_(7)  # autograd keeps the batch
    others = [memory.empty(4).fill_(0) for _ in range(5)]
    graph.sum().backward()  # type: ignore[no-untyped-call]
    assert len(others) == 5
    assert graph.grad_fn is not None
    assert float(graph.detach().min()) == 7
