"""Progress: a line every few seconds, or a bar on a terminal."""

from __future__ import annotations

import pytest

from petune.base.metric import Metric
from petune.base.text import format_percent
from petune.cli.progress import ProgressDisplay
from petune.cli.terminal import clean, format_count, format_flops, print_table
from petune.runner.events import RunStarted, on_dataset
from petune.training.events import EpochEnded, Note, StepDone


def _step(step: int) -> StepDone:
    return StepDone(step=step, total_steps=100, epoch=0, loss=1.5, lr=0.1, images_per_s=1234.5)


def test_clips_are_counted_as_clips(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petune.cli.progress.SECONDS_BETWEEN_LINES", 0)
    with ProgressDisplay(bar=False) as watch:
        watch(StepDone(step=1, total_steps=2, epoch=0, loss=1.5, lr=0.1, images_per_s=12, unit="clips"))
    assert "12 clips/s" in capsys.readouterr().err


EPOCH = EpochEnded(
    1, 2, {"epoch": 1, "train_loss": 1.25, "val_top1": 50.0}, Metric(name="top1", label="top-1", percent=True)
)


def test_a_line_every_few_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("petune.cli.progress.time.monotonic", lambda: now)
    with ProgressDisplay(bar=False) as watch:
        watch(Note("a\x1bnote"))
        watch(_step(10))
        now += 5
        watch(_step(20))
        now += 5
        watch(_step(30))
        watch(EPOCH)
        now += 10
        watch(_step(60))
    assert capsys.readouterr().err.splitlines() == [
        "anote",
        "step 30/100  loss 1.500  1,234 images/s  35.0 s left",
        "epoch 1/2  loss 1.250  val top-1 50.00 %",
        "step 60/100  loss 1.500  val 50.00 %  1,234 images/s  16.0 s left",
    ]


def test_several_runs_are_labeled(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(bar=False) as watch:
        watch(RunStarted("vpt", 1, 0, 2, True))
        on_dataset("digits", watch)(RunStarted("full", 0, 1, 2, False))
        watch(EpochEnded(1, 2, {"epoch": 1, "train_loss": 1.25}))
    assert capsys.readouterr().err.splitlines() == [
        "[1/2] vpt, seed 1: finished before",
        "[2/2] full on digits, seed 0",
        "[2/2] full on digits, seed 0  epoch 1/2  loss 1.250",
    ]


def test_the_bar_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ProgressDisplay(bar=True) as watch:
        watch(RunStarted("vpt", 1, 0, 2, False))
        watch(_step(99))
        watch(EPOCH)
        watch(_step(100))
    shown = capsys.readouterr().err
    assert "epoch 1/2  loss 1.250  val top-1 50.00 %" in shown
    assert "[1/2] epoch 1  loss 1.500  val 50.00 %  1,234 images/s" in shown
    assert "100%" in shown


def test_numbers_are_formatted_with_units() -> None:
    assert (format_count(1234567), format_count(None)) == ("1,234,567", "-")
    assert (format_percent(12.345, 1), format_percent(None)) == ("12.3 %", "-")
    assert (format_flops(35_126_135_808), format_flops(9_120_000)) == ("35.126 GFLOPs", "9.120 MFLOPs")


def test_clean_keeps_line_breaks_and_drops_control_characters() -> None:
    assert clean("a\tb\x00\x1b[0m\r\n\u202ec\x85d") == "a   b[0m\nc\nd"


def test_a_narrow_terminal_hides_optional_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_table(("name", "much text", "number"), [("a", "x" * 20, "3")], right=("number",), optional=("much text",))
    out, err = capsys.readouterr()
    assert "much" not in out
    assert "number" in out
    assert err == "hidden (terminal too narrow): much text\n"
