"""Runs that older versions of petune wrote can be evaluated, predicted with, exported and put into a bank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import petune
from petune.runner.run_adapter import read_run_adapter
from petune.serving.restore import rebuild_backbone
from tests.recorded_weights import needs_recorded_weights

V0 = Path(__file__).parents[1] / "golden" / "v0"
RUNS = ("adaptformer", "bitfit", "lora", "vpt")
pytestmark = needs_recorded_weights


@pytest.mark.parametrize("name", RUNS)
def test_an_evaluation_gives_the_recorded_result(name: str) -> None:
    result = json.loads((V0 / name / "result.json").read_text())
    for split, expected in (("test", result["top1"]), ("val", result["val_top1"])):
        evaluation = petune.evaluate(V0 / name, split=split, device="cpu", precision="fp32")
        assert evaluation.top1 == pytest.approx(expected, abs=0.3)  # one image of 359; kernels may round differently
        assert evaluation.num_images == sum(row.num_images for row in evaluation.classes)


def test_predictions_and_an_export(tmp_path: Path) -> None:
    import numpy as np

    gray = np.full((8, 8), 90, np.uint8)
    (prediction,) = petune.predict(V0 / "lora", gray, device="cpu")
    assert prediction.error == ""
    assert petune.export(V0 / "lora", tmp_path / "lora.safetensors").merged


def test_a_bank_of_old_adapters() -> None:
    bank = petune.AdapterBank(rebuild_backbone(read_run_adapter(V0 / "vpt")).model)
    for name in ("adaptformer", "vpt"):
        bank.load(name, V0 / name / "adapter")
    with torch.no_grad():
        logits = bank(torch.zeros(2, 3, 32, 32), ["adaptformer", "vpt"])
    assert [len(row) for row in logits] == [10, 10]
