"""Reference logits: a backbone or a method with the same tensors that computes something else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import petune
from petune.adapters.format import read_adapter
from petune.base.errors import BackboneMismatch, CheckpointError
from petune.injector.load import attach_saved
from petune.sites.logits import synthetic_logits
from tests.sampling import sampled
from tests.tiny import X, randomised, tiny

METHODS = ["adaptformer", "vpt", "bitfit", "linear", "lora"]


def sharpened(**options: Any) -> nn.Module:
    """A model with sharp attention, as after training: an untrained one averages, whatever the number of heads."""
    model = tiny(**options)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)
            block.mlp.fc2.weight.mul_(20)
    return model


def pooled(pool: str) -> nn.Module:
    model = sharpened()
    model.global_pool = pool
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "heads": lambda: sharpened(num_heads=3),
    "activation": lambda: sharpened(act_layer="relu"),
    "pooling": lambda: pooled("avg"),
    "normalisation": lambda: sharpened(norm_layer=_coarse),
}


def _coarse(dim: int, **options: Any) -> nn.LayerNorm:
    return nn.LayerNorm(dim, **options | {"eps": 0.1})


@pytest.mark.parametrize("method", sampled(METHODS, "adaptformer".__eq__))
@pytest.mark.parametrize("other", OTHERS)
def test_another_computation_with_the_same_tensors_is_refused(method: str, other: str, tmp_path: Path) -> None:
    randomised(petune.attach(sharpened(), method)).save(tmp_path / "a")
    model = OTHERS[other]()
    keys, logits = list(model.state_dict()), model(X)
    with pytest.raises(BackboneMismatch, match="same tensors that computes something else"):
        petune.load(model, tmp_path / "a")
    assert list(model.state_dict()) == keys
    assert torch.equal(model(X), logits)
    assert petune.load(sharpened(), tmp_path / "a").attached


class Masking(nn.Module):
    """Sets some logits to minus infinity, as Grounding DINO does for the words that a text lacks."""

    img_size = 16

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.vit(x)
        return logits.masked_fill(torch.arange(logits.shape[1]) == 0, -torch.inf)


def test_infinite_logits_are_no_reason_to_skip_a_check(tmp_path: Path) -> None:
    model = Masking(sharpened())
    att = randomised(petune.attach(model, "lora"))
    att.save(tmp_path / "a")
    with pytest.raises(BackboneMismatch, match="same tensors that computes something else"):
        petune.load(Masking(pooled("avg")), tmp_path / "a")
    assert petune.load(Masking(sharpened()), tmp_path / "a").attached
    logits = model(X)
    att.merge()
    assert torch.allclose(model(X)[:, 1:], logits[:, 1:], atol=1e-5)


@pytest.mark.exhaustive
def test_a_tuner_passes_its_check_on_a_model_with_infinite_logits() -> None:
    petune.check_tuner("adaptformer", Masking(tiny()))


def test_a_changed_method_is_named_with_both_versions(tmp_path: Path) -> None:
    randomised(petune.attach(sharpened(), "adaptformer")).save(tmp_path / "a")
    saved = read_adapter(tmp_path / "a")
    saved.config["reference_logits"]["logits"][0] += 1
    with pytest.raises(BackboneMismatch, match=r"as for training \(.*pooling\)$"):
        attach_saved(sharpened(), saved)
    saved.config["version"] = "0.0.1"
    with pytest.raises(
        BackboneMismatch, match=r"the method changed: it was saved with petune 0\.0\.1, here is petune "
    ):
        attach_saved(sharpened(), saved)


def test_rounding_passes(tmp_path: Path) -> None:
    randomised(petune.attach(sharpened(), "adaptformer")).save(tmp_path / "a")
    for coarse in (torch.float16, torch.bfloat16):  # float16 is as coarse as TF32
        with torch.autocast("cpu", coarse):
            model = sharpened()
            petune.load(model, tmp_path / "a")
            inside = model(X)
        with torch.autocast("cpu", coarse):
            assert torch.equal(model(X), inside), "autocast kept a weight from before it was loaded"


@pytest.mark.parametrize("method", ["adaptformer", "linear", "vpt", "bitfit"])
def test_a_forward_that_enters_autocast_itself_is_the_same_backbone(method: str, tmp_path: Path) -> None:
    """accelerate prepares models in that way."""

    def prepared() -> nn.Module:
        model = sharpened()
        plain = model.forward
        model.forward = lambda x: torch.autocast("cpu", torch.bfloat16)(plain)(x)  # type: ignore[method-assign]
        return model

    for build, other in ((prepared, sharpened), (sharpened, prepared)):
        att = randomised(petune.attach(build(), method))
        att.save(tmp_path / build.__name__)
        reference = petune.load(other(), tmp_path / build.__name__).reference_logits()
        assert reference == att.reference_logits()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_tolerance_is_above_rounding_and_below_another_backbone(dtype: torch.dtype) -> None:
    att = randomised(petune.attach(sharpened().to(dtype), "adaptformer"))
    reference = att.reference_logits()
    assert reference is not None
    assert len(reference["logits"]) == 5
    exact = torch.tensor(reference["logits"], dtype=torch.float64)
    places = torch.arange(3 * 16 * 16, dtype=torch.float64)
    image = torch.sin(places**2 / 10).reshape(1, 3, 16, 16).float()
    with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float32), torch.no_grad():
        rounded = (att.model if dtype == torch.float32 else att.model.float())(image).flatten().double()
    off = float((rounded - exact).abs().max())
    assert off < reference["tolerance"] < float(exact.abs().max()) / 6


@pytest.mark.parametrize(
    "damage", [[], {}, {"logits": "abc", "tolerance": 1}, {"logits": [1.0], "tolerance": 1}, {"logits": None}, "x", 3]
)
def test_reference_logits_that_cannot_be_read_are_an_error(damage: Any, tmp_path: Path) -> None:
    randomised(petune.attach(tiny(), "adaptformer")).save(tmp_path / "a")
    saved = read_adapter(tmp_path / "a")
    saved.config["reference_logits"] = damage
    model = tiny()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: reference_logits cannot be read"):
        attach_saved(model, saved)
    assert list(model.state_dict()) == list(tiny().state_dict())


def test_a_large_bias_hides_nothing(tmp_path: Path) -> None:
    def model(heads: int) -> nn.Module:
        built = sharpened(num_heads=heads)
        nn.init.constant_(built.head.bias, -100.0)
        return built

    randomised(petune.attach(model(2), "adaptformer", train_head=False)).save(tmp_path / "a")
    with pytest.raises(BackboneMismatch, match="same tensors that computes something else"):
        petune.load(model(3), tmp_path / "a")


def test_a_head_of_zeros_hides_nothing(tmp_path: Path) -> None:
    def model(heads: int) -> nn.Module:
        built = sharpened(num_heads=heads)
        nn.init.zeros_(built.head.weight)
        return built

    petune.attach(model(2), "adaptformer").save(tmp_path / "a")
    with pytest.raises(BackboneMismatch, match="features of a test image before the head"):
        petune.load(model(3), tmp_path / "a")
    assert petune.load(model(2), tmp_path / "a").attached


def test_a_slightly_other_computation_is_named(tmp_path: Path) -> None:
    """In the number format that the adapter was saved in, rounding explains far less than in another one."""
    randomised(petune.attach(sharpened(), "adaptformer")).save(tmp_path / "a")

    def scaled(by: float) -> nn.Module:
        model = sharpened()
        for block in model.blocks:
            block.attn.scale *= by
            block.attn.fused_attn = False  # the fused one has its own scale
        return model

    assert petune.load(scaled(1.0), tmp_path / "a").attached, "another kernel is the same computation"
    with pytest.warns(UserWarning, match="slightly something else .*and rounding explains"):
        petune.load(scaled(1.0001), tmp_path / "a")
    saved = read_adapter(tmp_path / "a")
    saved.config["reference_logits"]["number_format"] = None  # a GPU's, or that of an older petune
    assert attach_saved(scaled(1.0001), saved).attached


def test_a_forward_with_choices_allows_for_them() -> None:
    class Choosing(nn.Module):
        """Adds 1 to the logits if their sum is above a limit."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = timm.create_model("test_vit", num_classes=5)
            self.limit = torch.inf

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.inner(x)
            return logits + (logits.sum() > self.limit)

    torch.manual_seed(0)
    model = Choosing().eval()
    nn.init.normal_(model.inner.head.weight)
    att = petune.attach(model, "linear", input_size=(3, 160, 160))
    plain = att.reference_logits()
    model.limit = float(synthetic_logits(model, att.sites, 1).sum()) + 1e-4
    above = att.reference_logits()
    model.limit -= 2e-4
    below = att.reference_logits()
    assert plain is not None
    assert above is not None
    assert below is not None
    assert max(above["tolerance"], below["tolerance"]) > 0.9 > 0.1 > plain["tolerance"]


def test_there_are_none_next_to_others_and_a_disabled_attachment_is_enabled_for_them(tmp_path: Path) -> None:
    first = randomised(petune.attach(sharpened(), "adaptformer"))
    expected = first.reference_logits()
    second = petune.attach(first.model, "linear")
    assert first.reference_logits() is None
    second.disable()
    first.disable()
    assert first.reference_logits() == expected
    assert not first.enabled
    first.save(tmp_path / "a")
    with pytest.raises(BackboneMismatch, match="same tensors that computes something else"):
        petune.load(OTHERS["heads"](), tmp_path / "a")


def test_logits_that_are_not_finite_are_not_compared(tmp_path: Path) -> None:
    att = petune.attach(tiny(), "adaptformer")
    with torch.no_grad():
        next(iter(att.tuned.values())).fill_(torch.nan)
    att.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["reference_logits"] is None
    assert petune.load(tiny(), tmp_path / "a").attached


def test_a_model_that_passed_once_is_checked_again(tmp_path: Path) -> None:
    randomised(petune.attach(sharpened(), "adaptformer")).save(tmp_path / "two")
    randomised(petune.attach(sharpened(num_heads=3), "adaptformer")).save(tmp_path / "three")
    bank = petune.AdapterBank(sharpened())
    bank.load("a", tmp_path / "two")
    with pytest.raises(BackboneMismatch, match="same tensors that computes something else"):
        bank.load("b", tmp_path / "three")
    bank.load("b", tmp_path / "two")
    model = sharpened()
    petune.load(model, tmp_path / "two").detach()
    for block in model.blocks:
        block.attn.num_heads, block.attn.head_dim, block.attn.scale = 3, 8, 8**-0.5
    with pytest.raises(BackboneMismatch, match="same tensors that computes something else"):
        petune.load(model, tmp_path / "two")


def test_through_peft_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    petune.register_with_peft()
    randomised(petune.attach(sharpened(), "adaptformer")).save(tmp_path / "a")
    assert torch.equal(
        peft.PeftModel.from_pretrained(sharpened(), str(tmp_path / "a"))(X),
        petune.load(sharpened(), tmp_path / "a").model(X),
    )
    with pytest.raises(BackboneMismatch, match="same tensors that computes something else"):
        peft.PeftModel.from_pretrained(OTHERS["heads"](), str(tmp_path / "a"))
