"""Targets and options that leave nothing to learn or to choose by: one sentence before a model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import petune
from petune.base.errors import ConfigError, DataError
from petune.base.metric import LOSS, SplitMetrics
from petune.runner.differences import SeedValue, difference
from petune.training.tasks.classification import Classification
from petune.training.tasks.multi_label import MultiLabel
from petune.training.tasks.multi_label_loss import gradient_scale
from petune.training.tasks.multi_label_options import MultiLabelConfig
from tests.data.tables import write_images, write_table

TINY: dict[str, Any] = {
    "method": "linear", "backbone": "vit_nano", "weights": "none", "image_size": 8, "device": "cpu",
    "backbone_options": {"depth": 1, "embed_dim": 24, "num_heads": 2},
}  # fmt: skip
TRAIN: dict[str, Any] = {"epochs": 1, "batch_size": 20, "precision": "fp32", "lr": 0.01}


def table(folder: Path, **columns: Any) -> str:
    """Return a table of 30 images; a function gives the value of row i."""
    rows = [
        {"file": name, **{column: value(i) for column, value in columns.items()}}
        for i, name in enumerate(write_images(folder, 30))
    ]
    return str(write_table(folder / "t.jsonl", rows))


def test_a_metric_without_a_value_on_val(tmp_path: Path) -> None:
    parts = ["train"] * 18 + ["val"] * 6 + ["test"] * 6
    dataset = table(tmp_path, target=lambda i: 1.0 if parts[i] == "val" else float(i), split=lambda i: parts[i])
    with pytest.raises(ConfigError, match="no value"):
        petune.run(**TINY, dataset=dataset, train={**TRAIN, "choose": "r2"}, output=tmp_path / "run")
    result = petune.run(**TINY, dataset=dataset, train=TRAIN, output=tmp_path / "run2")
    assert result.val_metrics is not None


def test_tables_without_labels_and_huge_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no label"):
        petune.run(**TINY, dataset=table(tmp_path / "a", labels=lambda i: []), train=TRAIN)
    with pytest.raises(DataError, match="standard deviation"):
        petune.run(**TINY, dataset=table(tmp_path / "b", target=lambda i: (-1) ** i * 1e300), train=TRAIN)


def test_a_loss_without_a_gradient() -> None:
    with pytest.raises(ConfigError, match="no usable gradient"):
        gradient_scale(lambda logits, targets: (logits * 0).sum(1), torch.ones(4, 3))
    with pytest.raises((ConfigError, DataError)):
        MultiLabel(MultiLabelConfig(loss="twoway")).fit(
            petune.Split.of(np.zeros((4, 8, 8, 3), np.uint8), np.ones((4, 3), np.uint8)),
            petune.Target("multi_hot", ("a", "b", "c")),
        )


def test_names_of_classes_that_are_numbers() -> None:
    assert Classification(class_weights={0: 2, "1": 3}).config.class_weights == {"0": 2.0, "1": 3.0}


def test_the_loss_in_another_direction_has_a_value() -> None:
    metrics = SplitMetrics({"mae": 1.0}, loss=0.5, num_images=3)
    highest = LOSS.model_copy(update={"higher_is_better": True})
    assert metrics.value(highest) == 0.5
    assert metrics.report((highest,)) == {"loss": 0.5, "mae": 1.0}


def test_equal_differences_are_not_called_clear() -> None:
    own, base = ({seed: SeedValue(value) for seed in range(3)} for value in (90.0, 80.0))
    assert difference("base", own, base).is_clear is None  # type: ignore[union-attr]
    assert difference("base", own, own).is_clear is False  # type: ignore[union-attr]


def test_prompts_learn_at_the_rate_of_their_block() -> None:
    import timm

    from petune.training.layer_decay import lr_scales

    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, embed_dim=24, num_heads=2)
    scales = {}
    for method in ("vpt:num_prompts=2", "adaptformer:bottleneck=2"):
        attachment = petune.attach(model, method)
        params = dict(attachment.model.named_parameters())
        found = lr_scales(attachment, {k: p for k, p in params.items() if "petune" in k}, 0.5)
        scales[method] = sorted(set((found or {}).values()))
        attachment.detach()
    assert scales["vpt:num_prompts=2"] == scales["adaptformer:bottleneck=2"] == [0.125, 0.25, 0.5]
