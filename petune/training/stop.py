"""SIGTERM and Ctrl-C set a flag that training and evaluation look at; a second signal leaves at once."""

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

REPEATED_S = 5.0
"""Ctrl-C reaches the processes of a launcher from the terminal, and a second time from the launcher."""


class _Interrupt(BaseException):
    """Out of whatever the main thread does; not an Exception, since libraries catch those of their imports."""


class StopFlag:
    """A context in which the first SIGTERM or SIGINT asks to stop and the second one ends the process (130).

    Outside the main thread Python delivers no signals; the flag then is never set.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._came = 0.0
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self, group: Group = SINGLE_PROCESS) -> Iterator[None]:
        """Inside, nothing has been trained yet that could be lost, and a signal does not wait for the next check.

        Raises:
            Stopped: A signal came.
        """
        self._check_begun(group)
        try:
            self._at_once = True
            try:
                yield
            finally:
                self._at_once = False
        except _Interrupt:  # also one that came in the line above
            self._at_once = False
        self._check_begun(group)

    def _check_begun(self, group: Group) -> None:
        if group.any_rank(self.signal_name is not None):
            name = self.signal_name or "a signal to another process"
            raise Stopped(f"stopped by {name} before it trained; nothing is lost, start it again")

    def check(self, group: Group = SINGLE_PROCESS, failed: Sequence[Exception] = ()) -> None:
        """Raise `Stopped` if a signal has come, to this process or to another of the group.

        Args:
            group: Who stops together.
            failed: What went wrong on this process, to be raised on all.
        """
        if group.any_rank(self.signal_name is not None, failed):
            self.leave()

    def leave(self) -> NoReturn:
        """Raise `Stopped`."""
        name = self.signal_name or "a signal to another process"
        raise Stopped(f"stopped by {name}; what was done is saved, resume it with --resume")

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name is not None:
            if num_processes() > 1 and time.monotonic() - self._came < REPEATED_S:
                return
            os._exit(130)
        self._came = time.monotonic()
        self.signal_name = signal.Signals(number).name
        if self._at_once and num_processes() == 1:  # else at the end of `at_once`, with the others
            raise _Interrupt
