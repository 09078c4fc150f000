"""Adapters that petune wrote before format 2 load, and compute what they did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import petune
from petune.adapters.format import read_adapter
from petune.adapters.migrations import FORMAT, migrate
from petune.backbones.create import create_backbone
from petune.sites.logits import synthetic_logits
from tests.recorded_weights import needs_recorded_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "v0"
METHODS = ["adaptformer", "bitfit", "lora", "vpt"]


def backbone(run: Path) -> nn.Module:
    """The backbone of a golden run, built again from its config.yaml."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    options = config["backbone_options"]
    built = create_backbone(config["backbone"], weights="none", num_classes=10, options=options, seed=config["seed"])
    return built.model.eval()


def written(run: Path) -> dict[str, Any]:
    """petune's part of a golden adapter_config.json, as it was written."""
    content = json.loads((run / "adapter" / "adapter_config.json").read_text())
    part: dict[str, Any] = content if "format" in content else content["auto_mapping"]["petune"]
    return part


def reference(att: petune.Attachment) -> Tensor:
    return synthetic_logits(att.model, att.sites, 1).flatten()[:8].double()


@needs_recorded_weights
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_format_1_loads_and_computes_the_same(method: str, tmp_path: Path) -> None:
    run = GOLDEN / method
    saved = written(run)
    assert saved["format"] == 1
    att = petune.load(backbone(run), run / "adapter")
    scores = torch.tensor(saved["behaviour"]["scores"], dtype=torch.float64)
    torch.testing.assert_close(reference(att), scores, atol=saved["behaviour"]["tolerance"], rtol=0)
    att.save(tmp_path / "a")
    assert read_adapter(tmp_path / "a").config["format"] == FORMAT
    again = petune.load(backbone(run), tmp_path / "a")
    assert torch.equal(reference(again), reference(att))


@pytest.mark.parametrize("method", METHODS)
def test_format_2_has_the_new_words(method: str) -> None:
    config = read_adapter(GOLDEN / method / "adapter").config
    assert config["format"] == FORMAT
    assert set(config["reference_logits"]) == {"logits", "tolerance"}
    assert "images" in config["metadata"]
    assert config["metadata"]["test"]["num_images"] == 359
    assert not {"behaviour", "scores", "pictures", "num_pictures", "seed_study"} & keys(config)


def keys(value: Any) -> set[str]:
    """All keys of nested plain data."""
    if not isinstance(value, dict):
        return set()
    return {*value, *(key for inner in value.values() for key in keys(inner))}


def test_the_settings_of_the_paddle_study_were_called_seed() -> None:
    config = read_adapter(GOLDEN / "adaptformer" / "adapter").config
    assert config["config"]["variant"] == "paddle_study"
    assert config["metadata"]["method"] == "adaptformer:variant=paddle_study,bottleneck=2"
    metadata = {"backbone": {"name": "vit_seed", "seed": 0}}
    old = {"format": 1, "tuner": "linear", "config": {}, "metadata": metadata}
    assert migrate(old)["metadata"]["backbone"] == {"name": "vit_paddle_study", "seed": 0}


@pytest.mark.parametrize("metadata", [{}, {"test": "good", "backbone": "vit", "method": 3}, {"seed": 7}])
def test_metadata_of_the_users_own_is_left_alone(metadata: dict[str, Any]) -> None:
    old = {"format": 1, "tuner": "linear", "config": {}, "behaviour": None, "metadata": metadata}
    assert migrate(old)["metadata"] == metadata


def test_the_current_format_is_left_alone() -> None:
    config = read_adapter(GOLDEN / "vpt" / "adapter").config
    assert migrate(config) == config


def test_a_newer_format_says_how_to_upgrade() -> None:
    with pytest.raises(petune.CheckpointError, match=r"format 99.*pip install -U petune"):
        migrate({"format": 99})


@needs_recorded_weights
def test_peft_reads_an_adapter_of_format_1() -> None:
    peft = pytest.importorskip("peft")
    petune.register_with_peft()
    run = GOLDEN / "adaptformer"
    model = peft.PeftModel.from_pretrained(backbone(run), str(run / "adapter"))
    expected = petune.load(backbone(run), run / "adapter").model
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), expected(x))
