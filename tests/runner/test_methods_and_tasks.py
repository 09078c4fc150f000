"""Every method trains for every task, on backbones of three families, and what it saved computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import petune

VIT = {
    "architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 48, "image_size": 16, "patch_size": 4,
}  # fmt: skip
BACKBONES: dict[str, dict[str, Any]] = {
    "timm": {
        "backbone": "vit_nano", "image_size": 16,
        "backbone_options": {"depth": 2, "embed_dim": 24, "num_heads": 2},
    },
    "swin": {
        "backbone": "swin_tiny_patch4_window7_224", "image_size": 16,
        "backbone_options": {"patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": [2, 1], "num_heads": [2, 4]},
    },
    "transformers": {"backbone": "hf:vit"},
}  # fmt: skip
TARGETS = {"classification": "shape", "multi_label": "labels", "regression": "size", "segmentation": "mask"}
METHODS = ["peft:adalora" if record.name == "peft" else record.name for record in petune.list_tuners() if record.is_own]
REFUSED = {("lst", "swin"): "one width"}
"""Pairs of method and family that are refused, and a word of the reason."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_for_every_task_and_is_restored(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vit").mkdir()
    Path("vit", "config.json").write_text(json.dumps(VIT))
    for family, backbone in BACKBONES.items():
        for task, target in TARGETS.items():
            output = Path("runs", family, task)
            if (method, family) in REFUSED:
                with pytest.raises(petune.AttachError, match=REFUSED[method, family]):
                    _check(method, task, target, backbone, output)
            else:
                _check(method, task, target, backbone, output)


def _check(method: str, task: str, target: str, backbone: dict[str, Any], output: Path) -> None:
    result = petune.run(
        method=method, dataset=f"shapes,target={target},count=30,side=16", **backbone, weights="none", device="cpu",
        output=output, train={"epochs": 1, "batch_size": 8, "precision": "fp32"},
    )  # fmt: skip
    case = f"{method}, {task}, {output}"
    assert result.task == task, case
    assert result.metrics, case
    assert all(np.isfinite(value) for value in result.metrics.values()), case
    evaluation = petune.evaluate(output)
    assert evaluation.metrics == pytest.approx(result.metrics, rel=1e-4, abs=1e-4), case
