"""The test picture: a backbone, or a method, of the same tensors that computes something else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import petune
from petune.behaviour import TOLERANCE, behaviour
from petune.errors import BackboneMismatch
from petune.state import attach_saved, read_adapter
from tests.tiny import X, randomised, tiny

METHODS = ["adaptformer", "vpt", "bitfit", "linear", "lora"]


def sharpened(**options: Any) -> nn.Module:
    """Attention as trained ones have it: an untrained one averages, and it does not matter over how many heads."""
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("other", OTHERS)
def test_another_computation_with_the_same_tensors_is_refused(method: str, other: str, tmp_path: Path) -> None:
    randomised(petune.attach(sharpened(), method)).save(tmp_path / "a")
    model = OTHERS[other]()
    keys, scores = list(model.state_dict()), model(X)
    with pytest.raises(BackboneMismatch, match="same tensors that computes something else"):
        petune.load(model, tmp_path / "a")
    assert list(model.state_dict()) == keys
    assert torch.equal(model(X), scores)
    assert petune.load(sharpened(), tmp_path / "a").attached


def test_a_changed_method_is_named_with_both_versions(tmp_path: Path) -> None:
    randomised(petune.attach(sharpened(), "adaptformer")).save(tmp_path / "a")
    saved = read_adapter(tmp_path / "a")
    saved.config["behaviour"]["scores"][0] += 1
    with pytest.raises(BackboneMismatch, match=r"as for training \(.*pooling\)$"):
        attach_saved(sharpened(), saved)
    saved.config["version"] = "0.0.1"
    with pytest.raises(
        BackboneMismatch, match=r"the method changed: it was saved with petune 0\.0\.1, here is petune "
    ):
        attach_saved(sharpened(), saved)


def test_rounding_passes(tmp_path: Path) -> None:
    att = randomised(petune.attach(sharpened(), "adaptformer"))
    att.save(tmp_path / "a")
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["behaviour"]
    assert len(said["scores"]) == 5
    assert said["tolerance"] == pytest.approx(TOLERANCE * max(map(abs, said["scores"])), rel=1e-4)
    for coarse in (torch.float16, torch.bfloat16):  # float16 is as coarse as TF32
        with torch.autocast("cpu", coarse):
            model = sharpened()
            petune.load(model, tmp_path / "a")
            inside = model(X)
        with torch.autocast("cpu", coarse):
            assert torch.equal(model(X), inside), "autocast kept a weight from before it was loaded"


def test_a_forward_with_choices_allows_for_them(tmp_path: Path) -> None:
    class Choosing(nn.Module):
        """Takes whichever of two roads a hair decides."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = timm.create_model("test_vit", num_classes=5)
            self.limit = float(torch.inf)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.inner(x)
            return scores + (x.double().sum().abs() > self.limit)

    model = Choosing().eval()
    att = petune.attach(model, "linear", input_size=(3, 160, 160))
    plain = behaviour(att)
    places = torch.arange(3 * 160 * 160, dtype=torch.float64)
    model.limit = float(torch.sin(places**2 / 10).float().double().sum().abs()) * (1 + 1e-5)
    choosing = behaviour(att)
    assert plain is not None
    assert choosing is not None
    assert choosing["tolerance"] >= 9.9 > plain["tolerance"]


def test_what_cannot_be_told_is_not_compared(tmp_path: Path) -> None:
    model = tiny()
    first = randomised(petune.attach(model, "adaptformer"))
    second = petune.attach(model, "linear")
    assert behaviour(first) is None
    second.switch(False)
    assert behaviour(first) is not None
    first.switch(False)
    assert behaviour(first) is None
    first.switch(True)
    with torch.no_grad():
        next(iter(first.tuned.values())).fill_(torch.nan)
    assert behaviour(first) is None
    first.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["behaviour"] is None


def test_one_forward_for_each_kind_on_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in (("a", "adaptformer"), ("b", "adaptformer"), ("c", "linear")):
        randomised(petune.attach(tiny(), method)).save(tmp_path / name)
    forwards: list[int] = []
    look = petune.behaviour.look

    def counted(*args: Any) -> torch.Tensor:
        forwards.append(1)
        return look(*args)

    monkeypatch.setattr(petune.behaviour, "look", counted)
    tasks = petune.Tasks(tiny())
    done = []
    for name in "abc":
        tasks.load(name, tmp_path / name)
        done.append(len(forwards))
    assert done == [1, 1, 2]


def test_through_peft_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    randomised(petune.attach(sharpened(), "adaptformer")).save(tmp_path / "a")
    assert torch.equal(
        peft.PeftModel.from_pretrained(sharpened(), str(tmp_path / "a"))(X),
        petune.load(sharpened(), tmp_path / "a").model(X),
    )
    with pytest.raises(BackboneMismatch, match="same tensors that computes something else"):
        peft.PeftModel.from_pretrained(OTHERS["heads"](), str(tmp_path / "a"))
