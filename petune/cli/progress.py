"""Progress on stderr: a bar with rate and time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

from petune.cli.terminal import clean, print_status

if TYPE_CHECKING:
    from petune.runner.events import RunStarted
    from petune.training import EpochEnded, Event, StepDone

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context and a `watch` callback: shows what a run tells.

    Args:
        bar: Whether to draw a bar; None asks whether stderr is a terminal.
    """

    def __init__(self, bar: bool | None = None) -> None:
        self._bar: Any = _bar() if (sys.stderr.isatty() if bar is None else bar) else None
        self._task: Any = None
        self._label = ""  # which of several runs this is, in full
        self._place = ""  # likewise, short enough for the bar
        self._val = ""
        self._said = time.monotonic()
        self._began: tuple[float, int] | None = None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event | RunStarted) -> None:
        """Show the event."""
        from petune.training import EpochEnded, Note, StepDone

        if isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, EpochEnded):
            self._epoch(event)
        elif isinstance(event, Note):
            self.line(event.text)
        else:
            self._run(event)

    def line(self, text: str) -> None:
        """A line of talk, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(clean(text))
        else:
            print_status(clean(text))
        self._said = time.monotonic()

    def _run(self, event: RunStarted) -> None:
        label = f"[{event.index + 1}/{event.total}] {event.method}, seed {event.seed}"
        self._place = f"[{event.index + 1}/{event.total}] "
        self._label, self._val, self._began = f"{label}  ", "", None
        self.line(f"{label}: finished before" if event.done else label)
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def _step(self, event: StepDone) -> None:
        if self._began is None:  # a resumed run does not begin at step 1
            self._began = (time.monotonic(), event.step)
        state = f"loss {event.loss:.3f}{self._val}  {event.images_per_s:,.0f} images/s"
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=event.total_steps)
            text = f"{self._place}epoch {event.epoch + 1}  {state}"
            self._bar.update(self._task, completed=event.step, description=text)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self.line(f"{self._label}step {event.step}/{event.total_steps}  {state}{self._left(event)}")

    def _left(self, event: StepDone) -> str:
        from petune.base.text import format_duration

        began, first = self._began or (0.0, event.step)
        if event.step == first:
            return ""
        left_s = (time.monotonic() - began) / (event.step - first) * (event.total_steps - event.step)
        return f"  {format_duration(left_s)} left"

    def _epoch(self, event: EpochEnded) -> None:
        row = event.metrics
        val = f"{row['val_top1']:.2f} %" if "val_top1" in row else ""
        self._val = f"  val {val}" if val else ""
        said = f"  val top-1 {val}" if val else ""
        self.line(f"{self._label}epoch {event.epoch}/{event.epochs}  loss {row['train_loss']:.3f}{said}")


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(bar_width=10), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
