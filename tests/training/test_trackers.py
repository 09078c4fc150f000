"""Trackers: what they log, and errors if they are not available."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from petune.base.errors import MissingExtra, UnknownName
from petune.training import trackers
from petune.training.events import EpochEnded, Note, StepDone
from petune.training.trackers import Tracker


def _step(step: int) -> StepDone:
    return StepDone(step=step, total_steps=40, epoch=0, loss=1.0 / step, lr=0.1, images_per_s=100.0)


def test_steps_and_epochs_are_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = tmp_path / "run" / "tensorboard"
    tracker = Tracker("tensorboard", directory)
    assert not directory.parent.exists()  # the run claims its directory first
    for step in range(1, 21):
        tracker(_step(step))
    tracker(Note("not logged"))
    tracker(EpochEnded(1, 2, {"train_loss": 0.5, "val_top1": 75.0}))
    tracker.close()
    tracker.close()
    found = EventAccumulator(str(directory)).Reload()
    loss = [(e.step, round(e.value, 6)) for e in found.Scalars("train/loss")]
    assert loss == [(10, 0.1), (20, 0.05)]
    assert [(e.step, e.value) for e in found.Scalars("epoch/val_top1")] == [(20, 75.0)]
    assert set(found.Tags()["scalars"]) == {
        "train/loss", "train/lr", "train/images_per_s", "epoch/train_loss", "epoch/val_top1",
    }  # fmt: skip


CURVES = {"train/loss": [(10, 0.1), (20, 0.05)], "epoch/val_top1": [(20, 75.0)]}


def _tracked(name: str, directory: Path) -> None:
    tracker = Tracker(name, directory)
    for step in range(1, 21):
        tracker(_step(step))
    tracker(EpochEnded(1, 2, {"val_top1": 75.0}))
    tracker.close()


def test_mlflow_logs_to_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    _tracked("mlflow", tmp_path / "run" / "mlflow")
    for curve, expected in CURVES.items():
        (file,) = (tmp_path / "run" / "mlflow").glob(f"*/*/metrics/{curve}")
        rows = [line.split() for line in file.read_text().splitlines()]
        assert [(int(step), round(float(value), 6)) for _, value, step in rows] == expected
    (name,) = (tmp_path / "run" / "mlflow").glob("*/*/tags/mlflow.runName")
    assert name.read_text() == "run"


def test_wandb_logs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    _tracked("wandb", tmp_path / "compare" / "wandb" / "linear")
    (file,) = (tmp_path / "compare" / "wandb" / "linear").glob("wandb/offline-run-*/run-*.wandb")
    assert b"val_top1" in file.read_bytes()
    assert b"compare-linear" in file.read_bytes()


def test_trackio_logs_to_its_database_and_not_to_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is first imported
    pytest.importorskip("trackio")
    _tracked("trackio", tmp_path / "run" / "trackio")
    assert capsys.readouterr().out == ""
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "petune.db")) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, *_ in rows} == {"run"}
    assert [step for _, step, _ in rows] == [10, 20, 20]
    assert b"0.05" in rows[1][2]


def test_an_unknown_tracker_or_a_missing_package_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match=r"no such tracker: wandbb\. Did you mean wandb"):
        Tracker("wandbb", tmp_path)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name in trackers.TRACKERS:
        with pytest.raises(MissingExtra, match=rf'pip install "petune\[{name}\]"'):
            Tracker(name, tmp_path)
