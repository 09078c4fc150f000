"""A run lets a method choose what it trains: on training images only, once, and the same in every process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import petune
from petune.base.errors import ConfigError, Stopped
from petune.training.events import Event, StepDone
from petune.training.stop import StopFlag
from tests.injector.test_calibration import Rows

Make = Callable[..., Any]


class Counts(Rows):
    """Rows, and how often it was calibrated on which batches."""

    seen: list[torch.Tensor]

    def calibrate(self, batches: Iterable[petune.CalibrationBatch]) -> None:
        read = list(batches)
        self.seen.extend(batch.target for batch in read)
        super().calibrate(read)


def attached() -> petune.Attachment:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, depth=2, embed_dim=12, num_heads=2, num_classes=3
    )
    torch.nn.init.normal_(model.head.weight)
    tuner = Counts()
    Counts.seen = []
    return petune.attach(model, tuner, name="rows")


def values(att: petune.Attachment) -> dict[str, torch.Tensor]:
    return {key: t.clone() for key, t in att.state().items()}


def test_a_resumed_run_equals_the_uninterrupted_one_and_calibrates_once(tmp_path: Path, make_trainer: Make) -> None:
    whole = attached()
    trainer = make_trainer(whole, directory=tmp_path / "a")
    trainer.fit()
    assert whole.is_calibrated
    assert torch.cat(Counts.seen).sort().values.tolist() == sorted(trainer.job.dataset.train.targets.tolist())
    expected = values(whole)

    stop = StopFlag()

    def watch(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            stop.signal_name = "SIGTERM"

    with pytest.raises(Stopped):
        make_trainer(attached(), directory=tmp_path / "b", stop=stop, on_event=watch).fit()
    again = attached()
    make_trainer(again, directory=tmp_path / "b").fit()
    assert Counts.seen == []
    assert all(torch.equal(t, expected[key]) for key, t in values(again).items())


def test_sharded_weights_are_refused(tmp_path: Path, make_trainer: Make) -> None:
    trainer = make_trainer(attached(), directory=tmp_path)
    trainer.sharded = True
    with pytest.raises(ConfigError, match=r"rows looks at the whole model .* Use train.shard=false"):
        trainer.fit()
