"""The processes that torchrun or `accelerate launch` started for one run, and how they stay of one mind.

There is no wrapper around the model: every process computes the gradients of its part of each batch, and one sum over
all processes makes them those of the whole batch. What can fail on one process alone (a disk, a download, a full
memory) is told to all before they go on, so that nobody waits for one who will not come. Torch is imported by what
needs it: the program asks `leads()` before it prints.
"""

from __future__ import annotations

import atexit
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from petune.base import errors
from petune.base.errors import AttachError, ConfigError, Diverged, PetuneError, ProcessLost, Stopped

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

T = TypeVar("T")
NAMES = {
    "rank": ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    "size": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    "local": ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
}
"""Environment variables by which launchers say who a process is: torchrun and accelerate, Open MPI, Intel MPI."""
FINE, FLAGGED, FAILED = 0, 1, 2


def _told(what: str, otherwise: int) -> int:
    values = (os.environ.get(name, "") for name in NAMES[what])
    return next((int(value) for value in values if value.isdigit()), otherwise)


def num_processes() -> int:
    """How many processes a launcher started for this run; 1 without one."""
    return _told("size", 1)


def leads() -> bool:
    """Whether this process is the one of its run that prints and writes."""
    return num_processes() == 1 or _told("rank", 0) == 0


def this_process() -> str:
    """`process 2 of 4 (host)`, for messages."""
    return f"process {_told('rank', 0) + 1} of {num_processes()} ({platform.node()})"


def is_said_elsewhere(error: PetuneError) -> bool:
    """Whether another process of the run prints this error: the leader, or the first one of this machine."""
    if leads():
        return False
    alike = hasattr(error, "told_to_all") or isinstance(error, (AttachError, Diverged, Stopped))
    return alike or (error.exit_code in (2, 3) and _told("local", 0) > 0)


@dataclass(frozen=True)
class Group:
    """The processes of one run.

    Attributes:
        rank: Which one this is; 0 leads: it alone prints, and writes the run directory.
        size: How many there are; with 1 everything here does nothing.
        local_rank: Which one it is on its machine.
        wire: The process group for messages between processors; gradients go by the default one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    wire: Any = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Of `count` things, those that are this process's: parts differ by one at most."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def device(self, chosen: torch.device) -> torch.device:
        """`chosen`, or this process's own one of several GPUs.

        Raises:
            ConfigError: There are more processes than GPUs, or the devices cannot talk to each other.
        """
        import torch

        if self.size == 1 or chosen.type == "cpu":
            return chosen
        if chosen.type != "cuda":
            raise ConfigError(f"several processes need cpu or cuda, but the device is {chosen.type}; use --device cpu")
        if chosen.index is not None:
            raise ConfigError(
                f"each of {self.size} processes takes a GPU of its own, so --device must be cuda, not {chosen}"
            )
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"each process needs a GPU of its own, but this is process {self.local_rank + 1} of a machine with "
                f"{torch.cuda.device_count()}; start fewer, or use --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def any_rank(self, flag: bool = False, failed: Sequence[Exception] = ()) -> bool:
        """Meet the others: whether any of them raises `flag`.

        Args:
            flag: What to ask for.
            failed: What went wrong on this process since the last meeting, if anything.

        Raises:
            Exception: What went wrong on any process, on all of them.
            ProcessLost: A process is gone, or another one failed in a way that only it can tell.
        """
        if self.size == 1:
            if failed:
                raise failed[0]
            return flag
        import torch
        import torch.distributed as dist

        worst = torch.tensor(FAILED if failed else FLAGGED if flag else FINE)
        with _meeting(self):
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.wire)
        if int(worst) == FAILED:
            self._raise(failed)
        return int(worst) == FLAGGED

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, nobody waits for another; at the end all go on, or what failed on one is raised on all."""
        failed: list[Exception] = []
        with self.keeping(failed):
            yield
        self.any_rank(failed=failed)

    @contextmanager
    def keeping(self, failed: list[Exception]) -> Iterator[None]:
        """Inside, an error is kept for the next meeting; alone it is raised at once."""
        try:
            yield
        except Exception as error:
            if self.size == 1 or hasattr(error, "told_to_all") or isinstance(error, ProcessLost):
                raise
            failed.append(error)

    def broadcast(self, work: Callable[[], T]) -> T:
        """What `work` yields on the leader, which alone does it; to all."""
        if self.size == 1:
            return work()
        import torch.distributed as dist

        found: list[Any] = [None]
        with self.together():
            if self.leads:
                found = [work()]
        with _meeting(self):
            dist.broadcast_object_list(found, src=0, group=self.wire)
        result: T = found[0]
        return result

    def main_first(self, work: Callable[[], T]) -> T:
        """What `work` yields on each; the first process of a machine does it first, and the others find its cache."""
        found: list[T] = []
        for mine in (self.local_rank == 0, self.local_rank != 0):
            with self.together():
                if mine:
                    found.append(work())
            if self.size == 1:
                break
        return found[0]

    @contextmanager
    def on_main(self, context: AbstractContextManager[object]) -> Iterator[None]:
        """Enter `context` on the leader alone; where it cannot be entered, that fails everywhere."""
        with ExitStack() as held:
            with self.together():
                if self.leads:
                    held.enter_context(context)
            yield

    def smallest(self, number: int) -> int:
        """The smallest `number` of all."""
        if self.size == 1:
            return number
        import torch
        import torch.distributed as dist

        found = torch.tensor(number)
        with _meeting(self):
            dist.all_reduce(found, dist.ReduceOp.MIN, group=self.wire)
        return int(found)

    def add_up(self, tensor: Tensor) -> Tensor:
        """`tensor` becomes its sum over all processes, in place."""
        if self.size > 1:
            import torch.distributed as dist

            with _meeting(self):
                dist.all_reduce(tensor)
        return tensor

    def add_up_gradients(self, parameters: Sequence[nn.Parameter], also: Sequence[Tensor]) -> None:
        """Gradients, and the tensors `also`, become their sums over all processes: one message a step.

        A parameter that got a gradient on no process has none afterwards either, as in one process.
        """
        import torch

        has = torch.tensor([float(p.grad is not None) for p in parameters], device=also[0].device)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.add_up(torch.cat([t.detach().reshape(-1).float() for t in (has, *also, *parts)]))
        sizes = [t.numel() for t in (has, *also, *parts)]
        (has, *sums), begin = torch.split(flat, sizes), len(also)
        for tensor, total in zip(also, sums[:begin], strict=True):
            tensor.copy_(total.view_as(tensor))
        for parameter, total, count in zip(parameters, sums[begin:], has.tolist(), strict=True):
            if not count:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = total.view_as(parameter).to(parameter.dtype, copy=True)
            else:  # in its own memory: a view of `flat` is aligned otherwise, and its norm rounded otherwise
                parameter.grad.copy_(total.view_as(parameter))

    def _raise(self, failed: Sequence[Exception]) -> None:
        """Raise what failed on the lowest process, everywhere alike; all processes must be here."""
        import torch.distributed as dist

        told: list[Any] = [None] * self.size
        with _meeting(self):
            dist.all_gather_object(told, _told_of(failed[0]) if failed else None, group=self.wire)
        rank, (name, text) = next((rank, what) for rank, what in enumerate(told) if what)
        kind = getattr(errors, name, None)
        where = f" (process {rank + 1} of {self.size}, on {platform.node()})" if rank else ""
        if kind is None and failed:
            raise failed[0]
        error = _made(kind, f"{text}{where}") if kind else ProcessLost(f"process {rank + 1} failed: {name}: {text}")
        error.told_to_all = True  # type: ignore[attr-defined]
        raise error


ALONE = Group()
_joined: list[Group] = []


def join() -> Group:
    """The group of this process: of those that a launcher started, or that the caller joined with torch.distributed.

    Raises:
        ProcessLost: The others do not come.
    """
    if _joined:
        return _joined[0]
    import torch.distributed as dist

    if not dist.is_available() or (num_processes() == 1 and not dist.is_initialized()):
        return ALONE
    with _meeting(ALONE):
        if not dist.is_initialized():
            os.environ.update({"RANK": str(_told("rank", 0)), "WORLD_SIZE": str(num_processes())})
            dist.init_process_group()  # processors talk by gloo, GPUs by NCCL
            atexit.register(_leave)
        rank, size = dist.get_rank(), dist.get_world_size()
        if size == 1:
            return ALONE
        wire = dist.new_group(backend="gloo")
    _joined.append(Group(rank, size, _told("local", rank), wire))
    return _joined[0]


def _leave() -> None:
    import torch.distributed as dist

    _joined.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _meeting(group: Group) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # what torch.distributed raises: lost connection, timeout, no address
        reason = str(error).splitlines()[0]
        raise ProcessLost(
            f"the processes of a run must all stay, but process {group.rank + 1} of {group.size} lost the others "
            f"({reason}). What they said stands above; what was saved can be gone on from with --resume"
        ) from None


def _told_of(error: Exception) -> tuple[str, str]:
    return type(error).__name__, str(error)


def _made(kind: type[PetuneError], text: str) -> PetuneError:
    error = kind.__new__(kind)  # some have a constructor of their own, which would write the sentence anew
    error.args = (text,)
    return error
