"""Layer-wise decay of the learning rate, by the order of the forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch

import petune
from petune.base.errors import ConfigError
from petune.injector.param_groups import undecayed_keys
from petune.training.config import TrainConfig
from petune.training.layer_decay import lr_scales
from petune.training.optim import create_optimizer, create_schedule, peak_rate
from tests.sampling import sampled

VIT = {"img_size": 16, "patch_size": 8, "depth": 3, "embed_dim": 12, "num_heads": 2, "num_classes": 3}


def _vit() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **VIT)


def _scales(model: torch.nn.Module, method: str, decay: float = 0.5) -> dict[str, float]:
    att = petune.attach(model, method)
    scales = lr_scales(att, {**att.tuned, **att.head}, decay)
    assert scales is not None
    return scales


def test_full_fine_tuning_has_the_layers_of_timm() -> None:
    """But for the final norm: timm counts it to the last block, BEiT's authors to the head."""
    from timm.optim import param_groups_layer_decay

    model = _vit()
    scale_of = {id(p): g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.5) for p in g["params"]}
    expected = {key: scale_of[id(p)] for key, p in model.named_parameters()}
    assert _scales(model, "full") == {**expected, "norm.weight": 1.0, "norm.bias": 1.0}


def test_the_last_blocks_and_the_head() -> None:
    scales = _scales(_vit(), "partial:num_blocks=2")
    assert {key.split(".")[1] if "blocks" in key else key.split(".")[0]: s for key, s in scales.items()} == {
        "1": 0.25, "2": 0.5, "norm": 1.0, "head": 1.0,
    }  # fmt: skip


def _swin() -> torch.nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 2, 1, 1))


def _transformers() -> torch.nn.Module:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(hidden_size=12, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8)
    return Dinov2ForImageClassification(config)


def _torchvision() -> torch.nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 8, 3, 2, 12, 24, num_classes=3)


FAMILIES: dict[str, tuple[Callable[[], torch.nn.Module], str, str]] = {
    "swin": (_swin, "patch_embed", "head"),
    "dinov2": (_transformers, "dinov2.embeddings", "classifier"),
    "torchvision": (_torchvision, "conv_proj", "heads"),
}


@pytest.mark.parametrize("family", sampled(FAMILIES, "swin".__eq__))
def test_the_order_of_the_forward_decides_in_any_family(family: str) -> None:
    make, bottom, head = FAMILIES[family]
    model = make()
    blocks = petune.find_sites(model).blocks
    scales = _scales(model, "full")
    top = len(blocks) + 1
    for number, block in enumerate(blocks, 1):
        own = {id(p) for p in block.enter.parameters()}
        assert {scales[key] for key, p in model.named_parameters() if id(p) in own} == {0.5 ** (top - number)}
    assert {s for key, s in scales.items() if key.startswith(bottom)} == {0.5**top}
    assert {s for key, s in scales.items() if key.startswith(head)} == {1.0}
    assert set(scales.values()) <= {0.5**k for k in range(top + 1)}


def test_adapters_follow_their_block() -> None:
    scales = _scales(_vit(), "lora:r=2")
    assert sorted(set(scales.values())) == [0.125, 0.25, 0.5, 1.0]


def test_a_method_that_trains_nothing_in_blocks_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"linear trains nothing in the blocks.*layer_decay"):
        petune.run(
            method="linear", backbone="vit_nano", weights="none", backbone_options={"depth": 2, "embed_dim": 24},
            dataset="digits", shots=5, device="cpu", train={"layer_decay": 0.7}, output=tmp_path / "run",
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_rates_follow_the_schedule_with_their_factors() -> None:
    att = petune.attach(_vit(), "full")
    params = {**att.tuned, **att.head}
    config = TrainConfig(lr=0.1, weight_decay=0.05, optimizer="adamw", layer_decay=0.5, warmup=2)
    scales = lr_scales(att, params, 0.5)
    assert scales is not None
    optimizer = create_optimizer(params, undecayed_keys(att.model), config, scales)
    schedule = create_schedule(optimizer, config, 10)
    plain = create_optimizer(params, undecayed_keys(att.model), config)
    plain_schedule = create_schedule(plain, config, 10)
    for step in range(10):
        schedule.step_update(step)
        plain_schedule.step_update(step)
        rate = plain.param_groups[0]["lr"]
        assert peak_rate(optimizer) == pytest.approx(rate)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(rate * group["lr_scale"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(params)
    decay = {id(p): g["weight_decay"] for g in plain.param_groups for p in g["params"]}
    assert all(decay[id(p)] == g["weight_decay"] for g in optimizer.param_groups for p in g["params"])


def test_a_run_with_layer_decay_trains_and_a_factor_of_one_changes_nothing(tmp_path: Any) -> None:
    options: dict[str, Any] = {
        "method": "partial", "backbone": "vit_nano", "weights": "none",
        "backbone_options": {"depth": 2, "embed_dim": 24}, "dataset": "digits", "shots": 5, "device": "cpu",
    }  # fmt: skip
    train = {"epochs": 2, "lr": 0.01, "precision": "fp32"}
    rows = {}
    for name, decay in (("none", None), ("one", 1.0), ("half", 0.5)):
        petune.run(**options, train={**train, "layer_decay": decay}, output=tmp_path / name)
        rows[name] = (tmp_path / name / "metrics.jsonl").read_text()
    assert rows["none"] == rows["one"] != rows["half"]
