"""Runs on images of 12 and other numbers of channels: the backbone is adapted as timm does, and used so afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import petune
from petune.backbones.create import create_backbone
from petune.backbones.input_channels import set_input_channels
from petune.base.errors import ConfigError, DataError
from tests.sampling import sampled

TRAIN: dict[str, Any] = {"epochs": 1, "batch_size": 8, "precision": "fp32"}
NANO: dict[str, Any] = {
    "backbone": "vit_nano", "weights": "none", "image_size": 32,
    "backbone_options": {"depth": 1, "embed_dim": 24, "num_heads": 2},
}  # fmt: skip


def _family(name: str, path: Path) -> dict[str, Any]:
    """Return a tiny backbone of timm or transformers."""
    if name == "timm":
        return NANO
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    config.save_pretrained(path)
    return {"backbone": f"hf:{path}", "weights": "none", "image_size": 32}


def _folder(path: Path, channels: int = 12, dtype: str = "uint16", count: int = 10) -> Path:
    """Write images whose class shows in the last channel."""
    rng = np.random.default_rng(0)
    white = 1 if dtype == "float32" else np.iinfo(dtype).max
    for label, name in enumerate(("field", "forest")):
        (path / name).mkdir(parents=True)
        for number in range(count):
            bands = rng.random((32, 32, channels)) * 0.5
            bands[..., -1] += 0.5 * label
            np.save(path / name / f"{number}.npy", (bands * white).astype(dtype))
    return path


@pytest.mark.parametrize("family", sampled(["timm", "transformers"], "timm".__eq__))
def test_a_run_predicts_evaluates_and_exports_with_twelve_channels(family: str, tmp_path: Path) -> None:
    data = _folder(tmp_path / "data")
    done = petune.run(
        method="adaptformer:bottleneck=4", dataset=str(data), device="cpu", train=TRAIN, output=tmp_path / "run",
        **_family(family, tmp_path / "model"),
    )  # fmt: skip
    assert petune.evaluate(tmp_path / "run").top1 == pytest.approx(done.top1)
    predictor = petune.Predictor(tmp_path / "run")
    assert len(predictor.transform.preprocess.mean) == 12
    assert predictor.transform.preprocess.mean[-1] == pytest.approx(0.5, abs=0.06)
    file = data / "field" / "0.npy"
    by_file, by_array, rgb = predictor([file, np.load(file), np.zeros((32, 32, 3), np.uint8)])
    assert by_file.error == by_array.error == ""
    assert by_file.top == by_array.top
    assert "3 channels" in rgb.error
    assert "12 channels" in rgb.error
    with pytest.raises(DataError, match="trained on images of 12 channels") as other:
        petune.evaluate(tmp_path / "run", dataset=str(_folder(tmp_path / "two", 2, count=2)))
    assert "broken" not in other.value.cli_hint
    if family != "timm":  # an export takes ten seconds
        return
    petune.export(tmp_path / "run", tmp_path / "run.pt2")
    exported = torch.export.load(tmp_path / "run.pt2").module()
    assert exported(torch.zeros(2, 12, 32, 32)).shape == (2, 2)


@pytest.mark.parametrize(("channels", "dtype"), [(2, "uint8"), (4, "uint8"), (3, "uint16"), (1, "float32")])
def test_other_channels_and_types(channels: int, dtype: str, tmp_path: Path) -> None:
    petune.run(
        method="linear", dataset=str(_folder(tmp_path / "data", channels, dtype)), device="cpu", train=TRAIN,
        output=tmp_path / "run", **NANO,
    )  # fmt: skip
    preprocess = petune.Predictor(tmp_path / "run").transform.preprocess
    assert len(preprocess.mean) == channels
    assert preprocess.mean[-1] == pytest.approx(0.5, abs=0.06)  # of these images, not of ImageNet


def test_weights_are_adapted_as_timm_does(tmp_path: Path) -> None:
    rgb = create_backbone("vit_nano", num_classes=2)
    twelve = create_backbone("vit_nano", num_classes=2, channels=12)
    key = "patch_embed.proj.weight"
    weight, adapted = rgb.model.state_dict()[key], twelve.model.state_dict()[key]
    torch.testing.assert_close(adapted, timm.models.adapt_input_conv(12, weight))
    for name, tensor in rgb.model.state_dict().items():
        if name != key:
            assert torch.equal(tensor, twelve.model.state_dict()[name]), name
    # an input whose channels are alike gives the same output as before
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(twelve.model(x.expand(-1, 12, -1, -1)), rgb.model(x.expand(-1, 3, -1, -1)))


def test_another_library_gets_the_same_rule() -> None:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 1, 2, 24, 32, num_classes=2)
    weight, bias = model.conv_proj.weight.detach().clone(), model.conv_proj.bias
    set_input_channels("mine", model, 12)
    torch.testing.assert_close(model.conv_proj.weight, timm.models.adapt_input_conv(12, weight))
    assert model.conv_proj.bias is bias
    assert petune.find_sites(model).input_size == (12, 32, 32)
    with pytest.raises(ConfigError, match="5 channels"):
        set_input_channels("mine", model, 5)


def test_gray_by_option_of_the_run(tmp_path: Path) -> None:
    petune.run(
        method="linear", dataset="digits", shots=5, channels=1, device="cpu", train=TRAIN, output=tmp_path / "run",
        **NANO,
    )  # fmt: skip
    predictor = petune.Predictor(tmp_path / "run")
    assert len(predictor.transform.preprocess.mean) == 1
    assert predictor([np.zeros((8, 8, 3), np.uint8)])[0].error == ""


def test_what_does_not_fit_is_said_before_training(tmp_path: Path) -> None:
    data = str(_folder(tmp_path / "data", 4))

    def refused(match: str, **fields: Any) -> None:
        values = {**NANO, "dataset": data, "device": "cpu", **fields}
        with pytest.raises(ConfigError, match=match):
            petune.run(method="linear", train={**TRAIN, **fields.pop("train", {})}, output=tmp_path / "run", **values)

    refused("channels is 12, but the images of .* have 4", channels=12)
    refused("in_chans", backbone_options={"depth": 1, "in_chans": 3})
