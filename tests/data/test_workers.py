"""Threads that prepare images: torch computes on one core in each, and as before everywhere else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from petune.data.workers import BatchMemory, image_workers


def test_only_workers_compute_on_one_core() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with image_workers(4) as workers, ThreadPoolExecutor(1) as other, image_workers(2):
            assert set(workers.map(lambda _: torch.get_num_threads(), 40)) == {1}
            assert torch.get_num_threads() == 3
            assert other.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_workers_return_results_in_order() -> None:
    with image_workers(3) as workers:
        for count in (0, 1, 5, 100):
            assert workers.map(str, count) == [str(number) for number in range(count)]


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
