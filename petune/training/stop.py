"""SIGTERM and Ctrl-C set a flag that training and evaluation check; a second signal ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Self

from petune.base.distributed import SINGLE_PROCESS, Group, num_processes
from petune.base.errors import Stopped

EXIT_CODE = 130
SAME_SIGNAL_S = 5.0
"""Ctrl-C reaches the processes of a launcher twice: from the terminal, and from the launcher."""


class _Interrupt(BaseException):
    """Interrupts the main thread. Not an Exception, because libraries catch those while they import."""


class StopFlag:
    """A context in which the first SIGTERM or SIGINT requests a stop and the second one ends the process.

    Contexts may be inside each other, as that of one run in that of several: each knows of the signals to the others.
    Outside the main thread Python delivers no signals, so the flag is never set.

    Attributes:
        signal_name: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._received_at = 0.0
        self._interrupts = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._receive)
        if (outer := self._outer()) is not None:
            self.signal_name = outer.signal_name
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if (outer := self._outer()) is not None:
            outer.signal_name = self.signal_name

    def _outer(self) -> StopFlag | None:
        """Return the flag of the context that this one is inside, if any."""
        owner = getattr(self._handlers.get(signal.SIGINT), "__self__", None)
        return owner if isinstance(owner, StopFlag) else None

    @contextmanager
    def immediately(self, group: Group = SINGLE_PROCESS) -> Iterator[None]:
        """Let a signal interrupt immediately inside, where there is no progress to lose.

        Raises:
            Stopped: A signal came.
        """
        self._check_before_training(group)
        try:
            self._interrupts = True
            try:
                yield
            finally:
                self._interrupts = False
        except _Interrupt:  # also one that came in the line above
            self._interrupts = False
        self._check_before_training(group)

    def check(self, group: Group = SINGLE_PROCESS, errors: Sequence[Exception] = ()) -> None:
        """Raise `Stopped` if a signal came, to this process or to another one of the group.

        Args:
            group: The processes that stop together.
            errors: What failed on this process, to be raised on all.
        """
        if group.any_rank(self.signal_name is not None, errors):
            self.raise_stopped()

    def raise_stopped(self) -> NoReturn:
        """Raise `Stopped`."""
        raise Stopped(f"stopped by {self._signal()}. Progress is saved")

    def _check_before_training(self, group: Group) -> None:
        if group.any_rank(self.signal_name is not None):
            raise Stopped(f"stopped by {self._signal()} before training started")

    def _signal(self) -> str:
        return self.signal_name or "a signal to another process"

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name is not None:
            if num_processes() > 1 and time.monotonic() - self._received_at < SAME_SIGNAL_S:
                return
            os._exit(EXIT_CODE)
        self._received_at = time.monotonic()
        self.signal_name = signal.Signals(number).name
        if self._interrupts and num_processes() == 1:  # several processes stop together, at the end of the context
            raise _Interrupt
