"""Progress on stderr: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from petune.cli.terminal import clean, say

if TYPE_CHECKING:
    from petune.train import EpochEnded, Event, StepDone

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context and a `watch` callback: shows what a run tells.

    Args:
        bar: Whether to draw a bar; None asks whether stderr is a terminal.
    """

    def __init__(self, bar: bool | None = None) -> None:
        self._bar: Any = _bar() if (sys.stderr.isatty() if bar is None else bar) else None
        self._task: Any = None
        self._label = ""
        self._val = ""
        self._said = time.monotonic()
        self._began: tuple[float, int] | None = None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        from petune.train import EpochEnded, StepDone

        if isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, EpochEnded):
            self._epoch(event)
        else:
            self.line(event.text)

    def run_started(self, label: str) -> None:
        """The next of several runs begins."""
        self._label, self._val, self._began = f"{label}  ", "", None
        self.line(label)
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def line(self, text: str) -> None:
        """A line of talk, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(clean(text))
        else:
            say(clean(text))
        self._said = time.monotonic()

    def _step(self, event: StepDone) -> None:
        if self._began is None:  # a resumed run does not begin at step 1
            self._began = (time.monotonic(), event.step)
        state = f"loss {event.loss:.3f}{self._val}  {event.images_per_s:,.0f} images/s"
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=event.total_steps)
            text = f"{clean(self._label)}epoch {event.epoch + 1}  {state}"
            self._bar.update(self._task, completed=event.step, description=text)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            left = duration(self._left_s(event))
            self.line(f"{self._label}step {event.step}/{event.total_steps}  {state}  {left} left")

    def _left_s(self, event: StepDone) -> float | None:
        assert self._began is not None
        began, first = self._began
        done = event.step - first
        return (time.monotonic() - began) / done * (event.total_steps - event.step) if done else None

    def _epoch(self, event: EpochEnded) -> None:
        row = event.metrics
        val = f"  val top-1 {row['val_top1']:.2f} %" if "val_top1" in row else ""
        self._val = val
        self.line(f"{self._label}epoch {event.epoch}/{event.epochs}  loss {row['train_loss']:.3f}{val}")


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    description = TextColumn("{task.description}", markup=False)
    return Progress(description, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True)
