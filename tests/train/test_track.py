"""Training curves: what is logged, and what is said where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from petune.errors import MissingExtra, UnknownName
from petune.train import EpochEnded, Note, StepDone, track
from petune.train.track import Tracker


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


def test_an_unknown_tracker_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownName, match="no tracker is called 'wandb'"):
        Tracker("wandb", tmp_path)
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "petune\[tensorboard\]"'):
        Tracker("tensorboard", tmp_path)
