"""Signals."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from petune.base.errors import Stopped
from petune.training.stop import StopFlag

Make = Callable[..., Any]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_check_raises(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.signal_name == number.name
        with pytest.raises(Stopped, match=f"stopped by {number.name}"):
            stop.check()
    assert signal.getsignal(number) is before


def test_a_signal_inside_another_context_stops_both() -> None:
    with StopFlag() as outer:
        with StopFlag() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (inner.signal_name, outer.signal_name) == ("SIGTERM", "SIGTERM")
        with StopFlag() as later, pytest.raises(Stopped):
            later.check()


def test_a_second_signal_ends_the_process() -> None:
    child = os.fork()
    if child == 0:
        with StopFlag():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


def test_it_works_outside_the_main_thread() -> None:
    found: list[object] = []

    def work() -> None:
        with StopFlag() as stop:
            stop.check()
            found.append(stop.signal_name)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
    assert signal.getsignal(signal.SIGTERM) is before


def _interrupted(reached: list[str]) -> None:
    with StopFlag() as stop, stop.immediately():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("the next line")


def test_a_signal_before_training_interrupts_immediately() -> None:
    reached: list[str] = []
    with pytest.raises(Stopped, match="stopped by SIGTERM before training"):
        _interrupted(reached)
    assert not reached


def _swallowed() -> None:
    with StopFlag() as stop, stop.immediately(), contextlib.suppress(BaseException):  # as some libraries' imports do
        os.kill(os.getpid(), signal.SIGINT)


def test_a_suppressed_interrupt_still_stops() -> None:
    with pytest.raises(Stopped, match="before training"):
        _swallowed()
