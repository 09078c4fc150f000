"""Runs whose images an earlier version of petune resized in another way: finished ones are kept, others refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from petune.base.errors import CheckpointError
from petune.data.lookup import pixel_format
from petune.runner.run_config import RunConfig
from petune.runner.run_inputs import RunInputs, check_inputs, check_pixels_of_runs

RECIPE = {"lr": 0.1, "weight_decay": 0.0}


def _folder(path: Path) -> str:
    for name in ("cat", "dog"):
        for number in range(5):
            file = path / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9, 12, 3), number, np.uint8)).save(file)
    return f"folder:{path}"


def _forget_pixels(run_dir: Path) -> dict[str, Any]:
    """Let a run be one of a version that recorded no pixel format; return what it had recorded."""
    file = run_dir / "inputs.json"
    record: dict[str, Any] = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in record.items() if key != "pixels"}))
    return record


def test_runs_with_other_pixels_are_not_continued(tmp_path: Path) -> None:
    dataset = _folder(tmp_path / "pets")
    for name, is_resized in ((dataset, True), ("digits", False)):
        run_dir = tmp_path / f"run-{is_resized}"
        run_dir.mkdir()
        check_inputs(run_dir, RunInputs(name, "none", recipe=RECIPE))
        check_inputs(run_dir, RunInputs(name, "none", recipe=RECIPE))
        record = _forget_pixels(run_dir)
        assert ("pixels" in record, record["weight_decay"]) == (is_resized, 0.0)
        if is_resized:
            with pytest.raises(CheckpointError, match="resized images in another way"):
                check_inputs(run_dir, RunInputs(name, "none", recipe=RECIPE))
        else:
            check_inputs(run_dir, RunInputs(name, "none", recipe=RECIPE))
    assert pixel_format("torchvision:Flowers102") > 0
    assert pixel_format("torchvision:FashionMNIST") == 0


def test_no_table_mixes_pixels(tmp_path: Path) -> None:
    dataset = _folder(tmp_path / "pets")
    runs = [RunConfig(dataset=dataset, output=tmp_path / name) for name in "ab"]
    for own in runs:
        assert own.output is not None
        own.output.mkdir()
        check_inputs(own.output, RunInputs(dataset, "none", recipe=RECIPE))
    check_pixels_of_runs(runs)
    (tmp_path / "a" / "result.json").write_text("{}")
    check_pixels_of_runs(runs)
    _forget_pixels(tmp_path / "a")
    with pytest.raises(CheckpointError, match="resized images in another way"):
        check_pixels_of_runs(runs)
    (tmp_path / "b" / "result.json").write_text("{}")
    check_pixels_of_runs(runs)  # a finished table stays
