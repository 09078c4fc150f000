"""What a run imports before its first step: nothing that only a report, a score or another dataset needs."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import petune
from petune.training.events import StepDone

LATER = (
    "accelerate", "datasets", "diffusers", "IPython", "matplotlib", "onnx", "optuna", "pandas", "peft", "pyarrow",
    "scipy", "sklearn", "tensorboard", "torchmetrics", "transformers",
)  # fmt: skip
"""Packages that take time to import: torchmetrics at the first evaluation, others if they are needed at all."""


class FirstStep(Exception):
    """Stops a run."""


def test_a_run_imports_nothing_it_does_not_need_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*LATER, *sys.modules]:
        if name.partition(".")[0] in LATER:
            monkeypatch.setitem(sys.modules, name, None)  # an import of it is an error
    monkeypatch.delitem(sys.modules, "sklearn")
    unimported = ModuleType("sklearn")  # its digits are a file in its directory
    unimported.__spec__ = find_spec("sklearn")
    monkeypatch.setitem(sys.modules, "sklearn", unimported)

    def stop(event: Any) -> None:
        if isinstance(event, StepDone):
            raise FirstStep

    with pytest.raises(FirstStep):
        petune.run(
            method="adaptformer:bottleneck=4", backbone="vit_nano", weights="none", dataset="digits", shots=5,
            device="cpu", backbone_options={"depth": 1, "embed_dim": 48}, output=tmp_path / "run", watch=stop,
            train={"epochs": 1, "batch_size": 16, "precision": "fp32"},
        )  # fmt: skip
