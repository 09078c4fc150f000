"""Frozen weights in few bits: trained, saved, loaded by everything that builds the backbone again, exact when off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.backbones import quantize
from petune.backbones.create import create_backbone
from petune.backbones.quantize import QuantizedLinear, quantize_backbone
from tests.injector.quantized import Int8Weight
from tests.tiny import tiny

SHAPE = {"depth": 2, "img_size": 32, "patch_size": 8}
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


class Stored(Int8Weight):
    """What a backend returns."""

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.values()


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend without its package."""
    monkeypatch.setitem(quantize.BACKENDS, "int8", lambda: Stored.quantized)


@pytest.mark.usefixtures("backend")
def test_a_run_on_a_quantized_backbone_is_saved_and_used(tmp_path: Path) -> None:
    common: dict[str, Any] = {"backbone": "vit_nano", "backbone_options": {"depth": 2}, "weights": "none"}
    common |= {"dataset": "digits", "shots": 2, "device": "cpu", "method": "adaptformer:bottleneck=4"}
    train = {"epochs": 1, "batch_size": 8, "precision": "fp32"}
    result = petune.run(**common, base_precision="int8", train=train, output=tmp_path / "run")
    predictor = petune.Predictor(tmp_path / "run")
    assert sum(isinstance(m, QuantizedLinear) for m in predictor.model.modules()) == 8
    assert result.total == petune.attach(tiny_nano(), "adaptformer:bottleneck=4").counts.total
    further = petune.run(from_run=tmp_path / "run", train=train, output=tmp_path / "further")
    assert further.metrics
    with pytest.raises(petune.ConfigError, match="base_precision"):
        petune.run(from_run=tmp_path / "run", base_precision="auto", train=train, output=tmp_path / "other")


def tiny_nano() -> nn.Module:
    return create_backbone("vit_nano", weights="none", options={"depth": 2}, num_classes=10).model


@pytest.mark.usefixtures("backend")
def test_a_quantized_backbone_is_exact_when_off_and_moves() -> None:
    model, plain = tiny_nano(), tiny_nano()
    head = petune.find_sites(model).parts["head"]
    assert quantize_backbone(model, "auto", head) == 0
    assert quantize_backbone(model, "int8", head) == 8
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(before, plain(x), rtol=0.05, atol=0.05)
        att = petune.attach(model, "adaptformer")
        fingerprint = att.fingerprint()
        assert torch.equal(model.float().to("cpu")(x), before)
        with att.disabled():
            assert torch.equal(model(x), before)
    with torch.autocast("cpu", torch.bfloat16):
        att.train()(x).float().sum().backward()
    att.check_gradients()
    assert att.fingerprint() == fingerprint
    with pytest.raises(petune.AttachError, match="quantized"):
        petune.attach(model, "full", name="all")


def test_what_is_kept_for_the_backward_pass_is_the_stored_weight(backend: None) -> None:
    layer = nn.Sequential(nn.Linear(256, 128))
    quantize_backbone(layer, "int8", None)
    x = torch.randn(3, 256, requires_grad=True)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    y.backward(torch.ones_like(y))
    assert sum(sizes) < 128 * 256
    expected = torch.ones_like(y) @ layer[0].weight.dequantize()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(x.grad, expected)


def test_a_model_without_large_layers_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Callable[[Tensor], Tensor]:
        raise petune.MissingExtra("base_precision=int8", "quantized")

    monkeypatch.setitem(quantize.BACKENDS, "int8", missing)
    with pytest.raises(petune.MissingExtra, match="quantized"):
        quantize_backbone(tiny(), "int8", None)
    monkeypatch.setitem(quantize.BACKENDS, "int8", lambda: Stored.quantized)
    with pytest.raises(petune.ConfigError, match="base_precision"):
        quantize_backbone(tiny(), "int8", None)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("precision", PACKAGES)
def test_the_libraries_store_what_they_say(precision: Any) -> None:
    pytest.importorskip(PACKAGES[precision])
    model, plain = tiny_nano(), tiny_nano()
    assert quantize_backbone(model, precision, petune.find_sites(model).parts["head"]) == 8
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(before, plain(x), rtol=0.2, atol=0.2)
        att = petune.attach(model, "adaptformer")
        assert torch.equal(model.to("cpu")(x), before)
    att.train()(x).sum().backward()
    att.check_gradients()
