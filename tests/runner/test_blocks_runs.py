"""Runs with chosen blocks: cached below the lowest one, interrupted, continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import petune
from petune.base.errors import Stopped
from petune.training.events import Event, Note, StepDone

RUN: dict[str, Any] = {
    "backbone": "vit_nano", "weights": "none", "backbone_options": {"depth": 3, "embed_dim": 24, "num_heads": 2},
    "image_size": 8, "patch_size": 4, "device": "cpu", "dataset": "digits", "shots": 10,
    "method": "bitfit:blocks=last:1",
}  # fmt: skip
TRAIN = {"epochs": 2, "batch_size": 25, "precision": "fp32", "augment": "none"}


@pytest.mark.exhaustive
def test_a_run_with_chosen_blocks_is_cached_resumed_and_continued(tmp_path: Path) -> None:
    notes: list[str] = []

    def watch(event: Event) -> None:
        notes.extend([event.text] if isinstance(event, Note) else [])

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            raise Stopped("SIGTERM")

    cached = petune.run(**RUN, train=TRAIN, output=tmp_path / "cached", watch=watch)
    assert any("the frozen layers run once" in note for note in notes)
    petune.run(**RUN, train={**TRAIN, "cache_features": "never"}, output=tmp_path / "whole")
    with pytest.raises(Stopped):
        petune.run(**RUN, train=TRAIN, output=tmp_path / "stopped", watch=stop)
    petune.run(**RUN, train=TRAIN, output=tmp_path / "stopped", resume=True)
    tensors = [
        load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("cached", "whole", "stopped")
    ]
    assert all("blocks.2." in key or not key.startswith("blocks.") for key in tensors[0])
    for other in tensors[1:]:
        assert other.keys() == tensors[0].keys()
        assert all(other[key].equal(value) for key, value in tensors[0].items())
    again = petune.run(from_run=tmp_path / "cached", train={"epochs": 1}, output=tmp_path / "again")
    assert again.tuned == cached.tuned
    with pytest.raises(petune.ConfigError, match="blocks"):
        petune.run(from_run=tmp_path / "cached", method="bitfit", output=tmp_path / "other")
