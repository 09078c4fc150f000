"""A method that calibrates, and whose adapters have losses of their own, in a run: micro-batches, and a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import petune
from petune.base.errors import Stopped
from petune.training.events import Event, StepDone
from petune.training.stop import StopFlag
from tests.chooser import Chooser

Make = Callable[..., Any]


def attached() -> petune.Attachment:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, depth=2, embed_dim=12, num_heads=2, num_classes=3
    )
    torch.nn.init.normal_(model.head.weight)
    return petune.attach(model, Chooser(), name="chooser")


def losses(directory: Path) -> list[float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("last_step", [1, 3, 6])  # in the first epoch, in it, and in the second one
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    last_step: int, tmp_path: Path, make_trainer: Make
) -> None:
    whole = attached()
    make_trainer(whole, directory=tmp_path / "a", log_every=1).fit()
    stop = StopFlag()

    def watch(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == last_step:
            stop.signal_name = "SIGTERM"

    with pytest.raises(Stopped):
        make_trainer(attached(), directory=tmp_path / "b", stop=stop, on_event=watch, log_every=1).fit()
    again = attached()
    make_trainer(again, directory=tmp_path / "b", log_every=1).fit()
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    expected = whole.state()
    assert all(torch.equal(t, expected[key]) for key, t in again.state().items())


def test_micro_batches_calibrate_and_train_as_the_whole_batch(tmp_path: Path, make_trainer: Make) -> None:
    chosen = []
    for name, option in (("whole", {}), ("pieces", {"micro_batch_size": 2})):
        att = attached()
        make_trainer(att, directory=tmp_path / name, log_every=1, optimizer="sgd", **option).fit()
        chosen.append(att.tuner.entries.indices.clone())
    assert torch.equal(*chosen)
    whole, pieces = losses(tmp_path / "whole"), losses(tmp_path / "pieces")
    assert pieces == pytest.approx(whole, rel=1e-4)
    assert whole[0] > 1.0 + 2 * 0.3  # cross-entropy, and the mean rates of two blocks
