"""Show progress on stderr: a bar with rate and time left on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

from petune.cli.terminal import clean, print_status

if TYPE_CHECKING:
    from petune.runner.events import RunStarted
    from petune.training.events import EpochEnded, Event, StepDone

SECONDS_BETWEEN_LINES = 10.0


class ProgressDisplay:
    """A `watch` callback, and a context manager, that shows the events of training.

    Args:
        bar: Draw a bar; None draws one if stderr is a terminal.
    """

    def __init__(self, bar: bool | None = None) -> None:
        self._bar: Any = _bar() if (sys.stderr.isatty() if bar is None else bar) else None
        self._task: Any = None
        self._run_label = ""  # in lines, where there are several runs: "[1/2] vpt, seed 0  "
        self._run_number = ""  # in the bar: "[1/2] "
        self._val = ""
        self._last_line_s = time.monotonic()
        self._first_step: tuple[float, int] | None = None  # when the first step of this process ended, and its number

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event | RunStarted) -> None:
        """Show an event."""
        from petune.training.events import EpochEnded, Note, StepDone

        if isinstance(event, StepDone):
            self._show_step(event)
        elif isinstance(event, EpochEnded):
            self._show_epoch(event)
        elif isinstance(event, Note):
            self.line(event.text)
        else:
            self._start_run(event)

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(clean(text))
        else:
            print_status(clean(text))
        self._last_line_s = time.monotonic()

    def _start_run(self, event: RunStarted) -> None:
        self._run_number = f"[{event.index + 1}/{event.total}] "
        label = f"{self._run_number}{event.method}, seed {event.seed}"
        self._run_label = f"{label}  "
        self._val = ""
        self._first_step = None
        self.line(f"{label}: finished before" if event.done else label)
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def _show_step(self, event: StepDone) -> None:
        if self._first_step is None:
            self._first_step = (time.monotonic(), event.step)
        state = f"loss {event.loss:.3f}{self._val}  {event.images_per_s:,.0f} images/s"
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=event.total_steps)
            text = f"{self._run_number}epoch {event.epoch + 1}  {state}"
            self._bar.update(self._task, completed=event.step, description=text)
        elif time.monotonic() - self._last_line_s >= SECONDS_BETWEEN_LINES:
            self.line(f"{self._run_label}step {event.step}/{event.total_steps}  {state}{self._time_left(event)}")

    def _time_left(self, event: StepDone) -> str:
        from petune.base.text import format_duration

        start_s, first = self._first_step or (0.0, event.step)
        if event.step == first:
            return ""
        step_s = (time.monotonic() - start_s) / (event.step - first)
        return f"  {format_duration(step_s * (event.total_steps - event.step))} left"

    def _show_epoch(self, event: EpochEnded) -> None:
        metric = event.metric
        value = event.metrics.get(f"val_{metric.name}") if metric else None
        self._val = val = ""
        if metric and value is not None:
            self._val = f"  val {metric.text(value)}"
            val = f"  val {metric.label} {metric.text(value)}"
        self.line(f"{self._run_label}epoch {event.epoch}/{event.epochs}  loss {event.metrics['train_loss']:.3f}{val}")


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(bar_width=10), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
