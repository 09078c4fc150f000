"""Show progress on stderr: a bar with rate and time left on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from petune.cli.terminal import clean, print_status

if TYPE_CHECKING:
    from petune.runner.events import RunEvent, RunStarted
    from petune.training.events import EpochEnded, Event, StepDone

SECONDS_BETWEEN_LINES = 10.0


@dataclass
class _Run:
    """A run on display.

    Attributes:
        label: In lines, where there are several runs: `[1/2] vpt, seed 0  `.
        number: In the bar: `[1/2] `.
        val: The last value on val.
        first_step: When the first step of this process ended, and its number.
        task: Of the bar.
        last_line_s: When the last line was printed.
    """

    label: str = ""
    number: str = ""
    val: str = ""
    first_step: tuple[float, int] | None = None
    task: Any = None
    last_line_s: float = field(default_factory=lambda: time.monotonic())


class ProgressDisplay:
    """A `watch` callback, and a context manager, that shows the events of training.

    Args:
        bar: Draw a bar for each run; None draws them if stderr is a terminal.
    """

    def __init__(self, bar: bool | None = None) -> None:
        self._bar: Any = _bar() if (sys.stderr.isatty() if bar is None else bar) else None
        self._run = _Run()
        self._runs: dict[int, _Run] = {}  # several at a time

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event | RunStarted | RunEvent) -> None:
        """Show an event."""
        from petune.runner.events import RunEvent, RunStarted

        if isinstance(event, RunStarted):
            self._start_run(event)
        elif isinstance(event, RunEvent):
            self._show(event.event, self._one_of_several(event.run))
        else:
            self._show(event, self._run)

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(clean(text))
        else:
            print_status(clean(text))

    def _show(self, event: Event, run: _Run) -> None:
        from petune.training.events import EpochEnded, StepDone

        if isinstance(event, StepDone):
            self._show_step(event, run)
        elif isinstance(event, EpochEnded):
            self._show_epoch(event, run)
        else:
            self._line_of(run, event.text if run is self._run else f"{run.label}{event.text}")

    def _line_of(self, run: _Run, text: str) -> None:
        self.line(text)
        run.last_line_s = time.monotonic()

    def _one_of_several(self, started: RunStarted) -> _Run:
        if started.index not in self._runs:
            number = f"[{started.index + 1}/{started.total}] "
            self._runs[started.index] = _Run(f"{number}{started.title}  ", number)
        return self._runs[started.index]

    def _start_run(self, event: RunStarted) -> None:
        if self._bar is not None and self._run.task is not None:
            self._bar.remove_task(self._run.task)
        number = f"[{event.index + 1}/{event.total}] "
        label = f"{number}{event.title}"
        self._run = _Run(f"{label}  ", number)
        self.line(f"{label}: finished before" if event.done else label)

    def _show_step(self, event: StepDone, run: _Run) -> None:
        if run.first_step is None:
            run.first_step = (time.monotonic(), event.step)
        state = f"loss {event.loss:.3f}{run.val}  {event.images_per_s:,.0f} {event.unit}/s"
        if self._bar is not None:
            if run.task is None:
                run.task = self._bar.add_task("", total=event.total_steps)
            text = f"{run.number}epoch {event.epoch + 1}  {state}"
            self._bar.update(run.task, completed=event.step, description=text)
            if run is not self._run and event.step == event.total_steps:
                self._bar.remove_task(run.task)
                run.task = None
        elif time.monotonic() - run.last_line_s >= SECONDS_BETWEEN_LINES:
            left = _time_left(event, run)
            self._line_of(run, f"{run.label}step {event.step}/{event.total_steps}  {state}{left}")

    def _show_epoch(self, event: EpochEnded, run: _Run) -> None:
        metric = event.metric
        value = event.metrics.get(f"val_{metric.name}") if metric else None
        run.val = val = ""
        if metric and value is not None:
            run.val = f"  val {metric.text(value)}"
            val = f"  val {metric.label} {metric.text(value)}"
        loss = event.metrics["train_loss"]
        self._line_of(run, f"{run.label}epoch {event.epoch}/{event.epochs}  loss {loss:.3f}{val}")


def _time_left(event: StepDone, run: _Run) -> str:
    from petune.base.text import format_duration

    start_s, first = run.first_step or (0.0, event.step)
    if event.step == first:
        return ""
    step_s = (time.monotonic() - start_s) / (event.step - first)
    return f"  {format_duration(step_s * (event.total_steps - event.step))} left"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(bar_width=10), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
