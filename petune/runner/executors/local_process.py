"""Processes that do runs for `petune.runner.executors.local`, one run after the other each.

A process gets pickled jobs on its stdin and writes pickled events and answers to its stdout; whatever libraries print
goes to a file. It stops as after Ctrl-C when its stdin is closed, so also if the process that started it is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Self

from petune.base.errors import Stopped
from petune.runner.executors.executor import Failure, FromRun
from petune.runner.executors.memory import peak_memory
from petune.runner.executors.worker import WorkerJob
from petune.training.events import Event

SAVE_TIMEOUT_S = 60.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
STARTS = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from petune.runner.executors.local_process import serve
serve()
"""


@dataclass(frozen=True)
class Answer:
    """The end of the run at `index`: the answer of a `WorkerJob`, or a Failure if its process died."""

    index: int
    content: dict[str, Any] | Failure


class Process:
    """One process.

    Args:
        threads: Of torch.
        received: Gets what the process sends.

    Attributes:
        index: Of the run that it does; None if it waits.
    """

    def __init__(self, threads: int, received: queue.SimpleQueue[tuple[Process, Any]]) -> None:
        self.index: int | None = None
        self.printed = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self.popen = subprocess.Popen(
            [sys.executable, "-c", STARTS, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.printed,
            env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))},
            start_new_session=True,  # Ctrl-C reaches the process that started this one, which closes its stdin
        )
        self._received = received
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self, index: int, job: WorkerJob) -> None:
        """Start a run."""
        self.index = index
        with contextlib.suppress(BrokenPipeError):  # it died: `_read` says so
            _send(self._stdin, job)

    def close(self) -> None:
        """Let the process stop; a run saves its progress first."""
        with contextlib.suppress(OSError):
            self._stdin.close()

    def peak_memory(self) -> float:
        """Return the most bytes that it has had; 0 where it is not known."""
        return peak_memory(self.popen.pid)

    def end(self) -> None:
        """Kill the process if it still runs, and close its files."""
        self.popen.kill()
        self.popen.wait()
        self._reader.join()
        for file in (self.popen.stdout, self.printed):
            if file is not None:
                file.close()
        self.close()

    def death(self) -> Failure:
        """Return why it ended in the middle of a run."""
        code = self.popen.wait()
        self.printed.seek(0)
        lines = self.printed.read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1].strip()}" if lines and code > 0 else ""
        cause = f"was killed by signal {-code}, perhaps because memory ran out" if code < 0 else f"ended with {code}"
        return Failure("ProcessLost", f"the process of the run {cause}{last}", is_retryable=True)

    @property
    def _stdin(self) -> IO[bytes]:
        assert self.popen.stdin is not None
        return self.popen.stdin

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                self._received.put((self, pickle.load(self.popen.stdout)))
        self._received.put((self, None))


class Processes:
    """A few processes, as a context.

    Args:
        count: How many.
        threads: Of each.
    """

    def __init__(self, count: int, threads: int) -> None:
        self.threads = threads
        self.received: queue.SimpleQueue[tuple[Process, Any]] = queue.SimpleQueue()
        self.all = [Process(threads, self.received) for _ in range(count)]
        self._is_stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        for process in self.all:
            process.end()

    @property
    def busy(self) -> list[Process]:
        """The processes that do a run."""
        return [process for process in self.all if process.index is not None]

    def idle(self) -> Process | None:
        """Return one that waits, or None."""
        return next((process for process in self.all if process.index is None), None)

    def events(self, timeout_s: float) -> Iterator[FromRun | Answer]:
        """Yield what the processes send, until they have sent nothing for a while."""
        while True:
            try:
                process, message = self.received.get(timeout=timeout_s)
            except queue.Empty:
                return
            timeout_s = 0.001
            index = process.index
            if message is None:
                self.all[self.all.index(process)] = Process(self.threads, self.received)
                content: dict[str, Any] | Failure = process.death()
                process.end()
            elif isinstance(message, dict):
                process.index, content = None, message
            else:
                assert index is not None
                yield FromRun(index, message)
                continue
            if index is not None:
                yield Answer(index, content)

    def stop(self) -> None:
        """Stop all processes, and wait until their runs are saved; nothing is left to do the second time."""
        if self._is_stopped:
            return
        self._is_stopped = True
        for process in self.all:
            process.close()
        end = time.monotonic() + SAVE_TIMEOUT_S
        for process in self.all:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.0, end - time.monotonic()))


def serve() -> None:
    """Do the runs that come on stdin, until it is closed."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[WorkerJob | None] = queue.SimpleQueue()
    busy, closed = threading.Event(), threading.Event()
    stdin = os.fdopen(os.dup(0), "rb")
    threading.Thread(target=_receive, args=(stdin, jobs, busy, closed), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt, Stopped, BrokenPipeError):
        import timm  # noqa: F401  while another process has the first run

        while (job := jobs.get()) is not None:
            busy.set()
            if closed.is_set():  # jobs that came before the end, perhaps during the imports
                break
            answer = job(lambda event: _send(output, event))
            busy.clear()
            _send(output, answer)


def _receive(
    stdin: IO[bytes], jobs: queue.SimpleQueue[WorkerJob | None], busy: threading.Event, closed: threading.Event
) -> None:
    import _thread

    with contextlib.suppress(EOFError):
        while True:
            jobs.put(pickle.load(stdin))
    closed.set()
    jobs.put(None)
    if busy.is_set():
        _thread.interrupt_main()


def _send(file: IO[bytes], content: WorkerJob | Event | dict[str, Any]) -> None:
    pickle.dump(content, file)
    file.flush()
