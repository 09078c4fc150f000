"""SIGTERM and Ctrl-C set a flag that training and evaluation look at; a second signal leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from petune.errors import Stopped


class _Interrupt(BaseException):
    """Out of whatever the main thread does; not an Exception, since libraries catch those of their imports."""


class StopFlag:
    """A context in which the first SIGTERM or SIGINT asks to stop and the second one ends the process (130).

    Outside the main thread Python delivers no signals; the flag then is never set.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
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
    def at_once(self) -> Iterator[None]:
        """Inside, nothing has been trained yet that could be lost, and a signal does not wait for the next check.

        Raises:
            Stopped: A signal came.
        """
        self._check_begun()
        try:
            self._at_once = True
            try:
                yield
            finally:
                self._at_once = False
        except _Interrupt:  # also one that came in the line above
            self._at_once = False
        self._check_begun()

    def _check_begun(self) -> None:
        if self.signal_name is not None:
            raise Stopped(f"stopped by {self.signal_name} before it trained; nothing is lost, start it again")

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.signal_name is not None:
            raise Stopped(f"stopped by {self.signal_name}; what was done is saved, resume it with --resume")

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name is not None:
            os._exit(130)
        self.signal_name = signal.Signals(number).name
        if self._at_once:
            raise _Interrupt
