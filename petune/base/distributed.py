"""The processes that torchrun or `accelerate launch` started for one run.

The model is not wrapped: every process computes the gradients of its part of each batch, and one all-reduce sums them.
An error on one process (full disk, failed download, out of memory) is sent to all before they continue, so that no rank
blocks on one that has failed. Torch is imported inside the functions: the program asks `is_main_process()` before it
prints anything.
"""

from __future__ import annotations

import atexit
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from petune.base.errors import AttachError, ConfigError, Diverged, PetuneError, ProcessLost, Stopped

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")
RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
WORLD_SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
"""Environment variables set by torchrun and accelerate, Open MPI, Intel MPI."""
NO_FLAG, FLAG, ERROR = 0, 1, 2


def _from_launcher(names: Sequence[str], default: int) -> int:
    values = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdigit()), default)


def num_processes() -> int:
    """Return how many processes a launcher started for this run; 1 without a launcher."""
    return _from_launcher(WORLD_SIZE, 1)


def is_main_process() -> bool:
    """Return true in the process that prints and writes files: rank 0, or the only one."""
    return num_processes() == 1 or _from_launcher(RANK, 0) == 0


def process_name() -> str:
    """Return `process 2 of 4 (host)`, for messages."""
    return f"process {_from_launcher(RANK, 0) + 1} of {num_processes()} ({platform.node()})"


def is_reported_elsewhere(error: PetuneError) -> bool:
    """Return true if another process prints this error: the main one, or the first one on this machine."""
    if is_main_process():
        return False
    everywhere = error.raised_on_all_ranks or isinstance(error, (AttachError, Diverged, Stopped))
    return everywhere or (error.exit_code in (2, 3) and _from_launcher(LOCAL_RANK, 0) > 0)


@dataclass(frozen=True)
class Group:
    """The processes of one run. With `size` 1 every method is local and free.

    Attributes:
        rank: The number of this process; 0 is the main one, which alone prints and writes the run directory.
        size: The number of processes.
        local_rank: The number of this process on its machine.
        cpu_group: The torch process group (gloo) for objects and flags; gradients use the default one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    cpu_group: Any = None

    @property
    def is_main(self) -> bool:
        """True in the process that writes."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """Return this process's share of `count` items; the shares differ by one item at most."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def device(self, chosen: torch.device) -> torch.device:
        """Return `chosen`, or this process's own GPU if there are several processes.

        Raises:
            ConfigError: There are more processes than GPUs, or the device type supports one process only.
        """
        import torch

        if self.size == 1 or chosen.type == "cpu":
            return chosen
        use_cpu = "Use --device cpu"
        if chosen.type != "cuda":
            raise ConfigError(f"several processes cannot share the device {chosen}. Use cpu or cuda", cli_hint=use_cpu)
        if chosen.index is not None:
            raise ConfigError(f"device is {chosen}, but each of {self.size} processes takes its own GPU. Use cuda")
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {self.local_rank + 1} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}. Start fewer processes, or use the device cpu",
                cli_hint=use_cpu,
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def any_rank(self, flag: bool = False, errors: Sequence[Exception] = ()) -> bool:
        """Synchronize: return true if `flag` is true on any rank.

        Args:
            flag: This rank's flag.
            errors: What failed on this rank since the last synchronization.

        Raises:
            Exception: The error of the lowest rank that has one, on all ranks.
            ProcessLost: A process is gone, or the error is not one of petune's (its own rank raises it as it is).
        """
        if self.size == 1:
            if errors:
                raise errors[0]
            return flag
        import torch
        import torch.distributed as dist

        state = torch.tensor(ERROR if errors else FLAG if flag else NO_FLAG)
        with _lost_process_is_an_error(self):
            dist.all_reduce(state, dist.ReduceOp.MAX, group=self.cpu_group)
        if int(state) == ERROR:
            self._raise_first(errors)
        return int(state) == FLAG

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Raise an error of any rank on all ranks at the end of the block, which contains no synchronization."""
        errors: list[Exception] = []
        with self.collect_errors(errors):
            yield
        self.any_rank(errors=errors)

    @contextmanager
    def collect_errors(self, errors: list[Exception]) -> Iterator[None]:
        """Append an error of the block to `errors` for the next `any_rank`; a single process raises it at once."""
        try:
            yield
        except Exception as error:
            if self.size == 1 or isinstance(error, ProcessLost) or getattr(error, "raised_on_all_ranks", False):
                raise
            errors.append(error)

    def broadcast(self, work: Callable[[], T]) -> T:
        """Call `work` on the main process and return its result on all; it must be picklable."""
        if self.size == 1:
            return work()
        import torch.distributed as dist

        result: list[Any] = [None]
        with self.raise_together():
            if self.is_main:
                result = [work()]
        with _lost_process_is_an_error(self):
            dist.broadcast_object_list(result, src=0, group=self.cpu_group)
        value: T = result[0]
        return value

    def main_first(self, work: Callable[[], T]) -> T:
        """Call `work` on all processes, the first one of each machine before the others, which then find its cache."""
        if self.size == 1:
            return work()
        results: list[T] = []
        for is_my_turn in (self.local_rank == 0, self.local_rank != 0):
            with self.raise_together():
                if is_my_turn:
                    results.append(work())
        return results[0]

    @contextmanager
    def on_main(self, context: AbstractContextManager[object]) -> Iterator[None]:
        """Enter `context` on the main process only; if entering fails, all ranks raise the error."""
        with ExitStack() as stack:
            with self.raise_together():
                if self.is_main:
                    stack.enter_context(context)
            yield

    def all_reduce_min(self, number: int) -> int:
        """Return the smallest `number` of all ranks."""
        if self.size == 1:
            return number
        import torch
        import torch.distributed as dist

        smallest = torch.tensor(number)
        with _lost_process_is_an_error(self):
            dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self.cpu_group)
        return int(smallest)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over all ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            with _lost_process_is_an_error(self):
                dist.all_reduce(tensor)
        return tensor

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter], extra: Sequence[Tensor]) -> None:
        """Replace gradients and the tensors `extra` by their sums over all ranks, in one message.

        A parameter without a gradient on every rank keeps none, as in a single process.
        """
        import torch

        has_grad = torch.tensor([float(p.grad is not None) for p in parameters], device=extra[0].device)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        tensors = [has_grad, *extra, *grads]
        flat = self.all_reduce_sum(torch.cat([t.detach().reshape(-1).float() for t in tensors]))
        counts, *sums = torch.split(flat, [t.numel() for t in tensors])
        for tensor, total in zip(extra, sums, strict=False):
            tensor.copy_(total.view_as(tensor))
        for parameter, total, count in zip(parameters, sums[len(extra) :], counts.tolist(), strict=True):
            if not count:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = total.view_as(parameter).to(parameter.dtype, copy=True)
            else:  # a copy: a view of `flat` has another alignment, and its norm would round differently
                parameter.grad.copy_(total.view_as(parameter))

    def _raise_first(self, errors: Sequence[Exception]) -> None:
        """Raise the error of the lowest rank that has one; called on all ranks."""
        import torch.distributed as dist

        reports: list[tuple[str, PetuneError | str] | None] = [None] * self.size
        with _lost_process_is_an_error(self):
            dist.all_gather_object(reports, _report(errors[0]) if errors else None, group=self.cpu_group)
        rank, (host, failure) = next((rank, report) for rank, report in enumerate(reports) if report)
        if isinstance(failure, str):
            if errors:
                raise errors[0]
            failure = ProcessLost(f"process {rank + 1} failed: {failure}")
        elif rank:
            failure.args = (f"{failure} (process {rank + 1} of {self.size}, on {host})",)
        failure.raised_on_all_ranks = True
        raise failure


SINGLE_PROCESS = Group()
_initialized: list[Group] = []


def init_group() -> Group:
    """Return the group of this process; the first call connects the processes that a launcher started.

    Raises:
        ProcessLost: The other processes do not connect.
    """
    if _initialized:
        return _initialized[0]
    import torch.distributed as dist

    if not dist.is_available() or (num_processes() == 1 and not dist.is_initialized()):
        return SINGLE_PROCESS
    with _lost_process_is_an_error(SINGLE_PROCESS):
        if not dist.is_initialized():
            os.environ.update({"RANK": str(_from_launcher(RANK, 0)), "WORLD_SIZE": str(num_processes())})
            dist.init_process_group()  # gloo for CPU tensors, NCCL for CUDA tensors
            atexit.register(_destroy_group)
        rank, size = dist.get_rank(), dist.get_world_size()
        if size == 1:
            return SINGLE_PROCESS
        cpu_group = dist.new_group(backend="gloo")
    _initialized.append(Group(rank, size, _from_launcher(LOCAL_RANK, rank), cpu_group))
    return _initialized[0]


def _destroy_group() -> None:
    import torch.distributed as dist

    _initialized.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _lost_process_is_an_error(group: Group) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch.distributed: connection lost, timeout, no address
        reason = str(error).splitlines()[0]
        raise ProcessLost(
            f"process {group.rank + 1} of {group.size} lost the connection to the others ({reason}). See "
            "their messages above. Saved progress can be resumed",
            cli_hint="Add --resume",
        ) from None


def _report(error: Exception) -> tuple[str, PetuneError | str]:
    """Return host and error, as text where another process might not be able to unpickle it."""
    return platform.node(), error if isinstance(error, PetuneError) else f"{type(error).__name__}: {error}"
