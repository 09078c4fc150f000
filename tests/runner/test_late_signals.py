"""A signal that comes when a run has nothing left to stop stops those after it."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import petune
from petune.base.errors import Stopped

RUN: dict[str, Any] = {
    "method": "linear", "backbone": "vit_nano", "weights": "none", "image_size": 8, "dataset": "digits", "shots": 4,
    "backbone_options": {"depth": 1, "embed_dim": 24, "num_heads": 2}, "device": "cpu",
    "train": {"epochs": 1, "batch_size": 16, "precision": "fp32"},
}  # fmt: skip
FOLDS = {**RUN, "shots": None, "train": {**RUN["train"], "batch_size": 1000}}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "compare": (petune.compare, {"methods": ("linear",), "seeds": (0, 1), "run": RUN}, "run.write_test_values"),
    "folds": (petune.cross_validate, {**FOLDS, "folds": 2}, "run.write_test_values"),
    "sweep": (petune.sweep, {"search": {"train.lr": (1e-3, 1e-2)}, "run": RUN}, "sweep.fit.replace_file"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_signal_while_results_are_written_stops_before_the_next_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, options, last_step = CALLS[name]
    module, _, function = f"petune.runner.{last_step}".rpartition(".")
    original = getattr(importlib.import_module(module), function)

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(importlib.import_module(module), function, interrupted)
    with pytest.raises(Stopped, match="SIGTERM"):
        call(**options, output=tmp_path / "out")
    results = [file for name in ("result.json", "trial.json") for file in (tmp_path / "out").glob(f"*/{name}")]
    assert len(results) == 1
    monkeypatch.undo()
    call(**options, output=tmp_path / "out")
    assert len([*(tmp_path / "out").glob("*/config.yaml")]) == 2
