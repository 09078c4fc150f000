"""Frozen weights in few bits: trained, saved, loaded by everything that builds the backbone again, exact when off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
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
    sites = petune.find_sites(model)
    assert quantize_backbone(model, "auto", sites) == 0
    assert quantize_backbone(model, "int8", sites) == 8
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
    layer = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 2))
    assert quantize_backbone(layer, "int8", petune.find_sites(layer, example=torch.zeros(1, 256))) == 1
    layer = layer[:1]
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
        quantize_backbone(tiny(), "int8", petune.find_sites(tiny()))
    monkeypatch.setitem(quantize.BACKENDS, "int8", lambda: Stored.quantized)
    with pytest.raises(petune.ConfigError, match="base_precision"):
        quantize_backbone(tiny(), "int8", petune.find_sites(tiny()))


class SelfReader(nn.Module):
    """A classifier that reads the weight of one of its layers itself, and never calls another."""

    def __init__(self, *, only: bool = False) -> None:
        super().__init__()
        self.called = nn.Identity() if only else nn.Linear(128, 128)
        self.read = nn.Linear(128, 128)
        self.both = nn.Linear(128, 128)
        self.unused = nn.Linear(128, 128)
        self.head = nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.called.weight.dtype if isinstance(self.called, nn.Linear) else x.dtype))
        x = nn.functional.linear(input=x, weight=self.read.weight, bias=self.read.bias)
        x = self.both(x) @ self.both.weight.T
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("backend")
def test_only_layers_that_run_by_their_own_forward_are_quantized() -> None:
    model, x = SelfReader(), torch.randn(2, 128)
    assert quantize_backbone(model, "int8", petune.find_sites(model, example=x)) == 1
    assert [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)] == ["called"]
    assert model(x).isfinite().all()
    only = SelfReader(only=True)
    with pytest.raises(petune.ConfigError, match="base_precision"):
        quantize_backbone(only, "int8", petune.find_sites(only, example=x))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_qkv_that_timm_reads_by_its_weight_stays_as_it_is(name: str) -> None:
    shape = {"depth": 1, "embed_dim": 128, "num_heads": 2, "patch_size": 16}
    model = create_backbone(
        name, weights="none", num_classes=3, image_size=32, base_precision="int8", options=shape
    ).model
    assert {type(m) for path, m in model.named_modules() if path.endswith("attn.qkv")} == {nn.Linear}
    assert any(isinstance(m, QuantizedLinear) for m in model.modules())
    petune.attach(model, "adaptformer").train()(torch.randn(1, 3, 32, 32)).sum().backward()


def test_a_missing_package_is_reported_before_weights_and_data_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing() -> Callable[[Tensor], Tensor]:
        raise petune.MissingExtra("base_precision=int8", "quantized")

    monkeypatch.setitem(quantize.BACKENDS, "int8", missing)
    absent: Any = {"weights": str(tmp_path / "absent.safetensors"), "base_precision": "int8"}
    with pytest.raises(petune.MissingExtra, match="quantized"):
        create_backbone("vit_nano", num_classes=3, **absent)
    with pytest.raises(petune.MissingExtra, match="quantized"):
        petune.run(method="linear", backbone="vit_nano", dataset="digits", output=tmp_path / "run", **absent)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("backend")
def test_an_adapter_of_another_base_precision_is_refused_by_that_name(tmp_path: Path) -> None:
    model, quantized = tiny_nano(), tiny_nano()
    quantize_backbone(quantized, "int8", petune.find_sites(quantized))
    record = {"name": "vit_nano", "weights": "none", "seed": 0}
    petune.attach(quantized, "linear").save(tmp_path / "a", metadata={"backbone": {**record, "base_precision": "int8"}})
    petune.attach(model, "linear").save(tmp_path / "b", metadata={"backbone": record})
    with pytest.raises(petune.BackboneMismatch, match=r"base_precision=int8.* not quantized"):
        petune.load(tiny_nano(), tmp_path / "a")
    other = tiny_nano()
    quantize_backbone(other, "int8", petune.find_sites(other))
    with pytest.raises(petune.BackboneMismatch, match=r"base_precision=auto.* quantized \(Stored\)"):
        petune.load(other, tmp_path / "b")


@pytest.mark.usefixtures("backend")
def test_weights_that_are_replaced_after_from_pretrained_are_not_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "SMALLEST", 1)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**shape, image_size=16, patch_size=8, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    build = functools.partial(create_backbone, f"hf:{tmp_path}", num_classes=3)
    by_user = build().model
    for layer in by_user.vit.layers[1].modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(Stored.quantized(layer.weight.detach()), requires_grad=False)
    widened = build().model
    layer = widened.vit.layers[0].mlp.fc1
    widened.vit.layers[0].mlp.fc1 = nn.Linear(24, 48)
    att = petune.attach(widened, "adaptformer", bottleneck=2)
    assert {key.partition(".")[0] for key in att.head} == {"classifier"}
    att.detach()
    widened.vit.layers[0].mlp.fc1 = layer
    layer.weight = nn.Parameter(layer.weight.detach() * 2)
    with pytest.raises(petune.AttachError, match=r"replaced later.*copy_"):
        petune.attach(widened, "adaptformer")
    moved = build(base_precision="int8").model.bfloat16().float()
    for model in (moved, build(channels=4).model, by_user):
        assert petune.attach(model, "adaptformer", bottleneck=2).tuned


@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize("method", ["peft:oft", "peft:hra", "full"])
def test_a_method_that_cannot_take_quantized_weights_names_base_precision(method: str) -> None:
    pytest.importorskip("torchao")
    model = create_backbone(
        "vit_nano", weights="none", options={"depth": 1}, num_classes=3, base_precision="int8"
    ).model
    with pytest.raises(petune.AttachError, match=r"quantized.*base_precision=auto") as raised:
        petune.attach(model, method)
    assert len(str(raised.value)) < 500


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("precision", PACKAGES)
def test_the_libraries_store_what_they_say(precision: Any) -> None:
    pytest.importorskip(PACKAGES[precision])
    model, plain = tiny_nano(), tiny_nano()
    assert quantize_backbone(model, precision, petune.find_sites(model)) == 8
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(before, plain(x), rtol=0.2, atol=0.2)
        att = petune.attach(model, "adaptformer")
        assert torch.equal(model.to("cpu")(x), before)
    att.train()(x).sum().backward()
    att.check_gradients()
