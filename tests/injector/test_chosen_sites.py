"""What was attached to chosen sites trains, is saved and is loaded there, and nowhere else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn

import petune
from tests.sampling import sampled
from tests.tiny import X, randomised, tiny

METHODS = [
    "adaptformer:bottleneck=4", "lora", "bitfit", "norm", "partial", "vpt:num_prompts=3,deep=false", "peft:ln_tuning",
    "lst",
]  # fmt: skip
SAMPLE = {"adaptformer:bottleneck=4", "norm", "vpt:num_prompts=3,deep=false"}
"""Methods that every run of the tests saves and loads."""


def chosen(model: nn.Module, *indices: int) -> petune.Sites:
    sites = petune.find_sites(model)
    return replace(sites, blocks=tuple(sites.blocks[i] for i in indices))


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's own, about timm's LayerNorm
@pytest.mark.parametrize("method", sampled(METHODS, lambda method: method in SAMPLE))
def test_what_was_attached_to_chosen_blocks_is_saved_and_loaded(method: str, tmp_path: Path) -> None:
    model = tiny(depth=4)
    att = randomised(petune.attach(model, method, sites=chosen(model, 0, 1)))
    att.save(tmp_path / "out")
    loaded = petune.load(tiny(depth=4), tmp_path / "out")
    assert [block.index for block in loaded.sites.blocks] == [0, 1]
    assert len(loaded.tuned) == len(att.tuned)
    with torch.no_grad():
        assert torch.equal(loaded.model(X), model(X))


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's own, about timm's LayerNorm
@pytest.mark.parametrize("method", [m for m in METHODS if m != "lst"])
def test_only_chosen_blocks_train(method: str) -> None:
    model = tiny(depth=4)
    att = petune.attach(model, method, sites=chosen(model, 1, 2))
    assert not [key for key in att.tuned if "blocks.0." in key or "blocks.3." in key]
    assert any("blocks.2." in key for key in att.tuned) or "deep=false" in method


@pytest.mark.parametrize("method", ["bitfit", "norm"])
def test_parts_outside_all_blocks_still_train(method: str) -> None:
    model = tiny(depth=3)
    tuned = petune.attach(model, method, sites=chosen(model, 2)).tuned
    assert "norm.bias" in tuned
    assert {key.split(".")[1] for key in tuned if key.startswith("blocks.")} == {"2"}


def test_a_method_that_trains_what_the_sites_leave_out_is_refused() -> None:
    model = tiny(depth=3)
    sites = petune.find_sites(model)
    for method in ("full", "adaptformer:train_backbone=true"):
        for chosen_sites in (sites.only("blocks"), sites.only(lambda block: block.index == 1)):
            with pytest.raises(petune.AttachError, match=r"does not follow sites\.only: it trains .* which the sites"):
                petune.attach(model, method, sites=chosen_sites)
        petune.attach(model, method, sites=sites.only(lambda block: True)).detach()
    assert not any("petune" in name for name, _ in model.named_modules())


def test_an_adapter_on_all_blocks_records_no_choice(tmp_path: Path) -> None:
    model = tiny()
    petune.attach(model, "norm").save(tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config.get("petune", config)["chosen_sites"] == {"blocks": None, "head": None}


def test_a_chosen_head_is_loaded_as_the_head(tmp_path: Path) -> None:
    def build() -> nn.Module:
        body = tiny()
        body.reset_classifier(0)
        torch.manual_seed(3)
        return nn.Sequential(body, nn.Sequential(nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 5))).eval()

    model = build()
    sites = petune.find_sites(model, (3, 16, 16), head="1")
    att = randomised(petune.attach(model, "adaptformer", bottleneck=4, sites=sites))
    assert len(att.head) == 4
    att.save(tmp_path / "out")
    loaded = petune.load(build(), tmp_path / "out")
    assert loaded.head.keys() == att.head.keys()
    with torch.no_grad():
        assert torch.equal(loaded.model(X), model(X))


def test_adapters_on_different_blocks_are_loaded_onto_one_model(tmp_path: Path) -> None:
    model = tiny(depth=4)
    first = randomised(petune.attach(model, "adaptformer", bottleneck=4, sites=chosen(model, 0, 3)))
    second = randomised(petune.attach(model, "lora", sites=chosen(model, 1)))
    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    fresh = tiny(depth=4)
    loaded = [petune.load(fresh, tmp_path / name) for name in ("first", "second")]
    assert [[b.index for b in att.sites.blocks] for att in loaded] == [[0, 3], [1]]
    with torch.no_grad():
        assert torch.equal(fresh(X), model(X))


def test_a_backbone_of_another_depth_is_still_refused(tmp_path: Path) -> None:
    model = tiny(depth=3)
    petune.attach(model, "norm", sites=chosen(model, 0, 1)).save(tmp_path / "out")
    with pytest.raises(petune.BackboneMismatch):
        petune.load(tiny(depth=2), tmp_path / "out")
    with pytest.raises(petune.BackboneMismatch):
        petune.load(tiny(depth=4), tmp_path / "out")


def test_a_bank_holds_adapters_on_different_blocks(tmp_path: Path) -> None:
    model = tiny(depth=3)
    att = randomised(petune.attach(model, "adaptformer", bottleneck=4, sites=chosen(model, 1)))
    att.save(tmp_path / "one")
    with torch.no_grad():
        expected = model(X)
    bank = petune.AdapterBank(tiny(depth=3))
    bank.load("one", tmp_path / "one")
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(bank(X, ["one", "one"])), expected)


class Poolers(nn.Module):
    """A classifier with a layer that it never calls, and one whose output it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.body: Any = tiny()
        self.body.reset_classifier(0)
        self.idle = nn.Linear(24, 24)
        self.unused = nn.Linear(24, 24)
        self.unused_norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.body(x)
        self.unused_norm(self.unused(features))
        return self.head(features)


@pytest.mark.filterwarnings("ignore:the classifier of Poolers:UserWarning")
@pytest.mark.parametrize("method", ["bitfit", "norm"])
def test_layers_that_the_logits_do_not_depend_on_do_not_train(method: str) -> None:
    model = Poolers()
    att = petune.attach(model, method, sites=petune.find_sites(model, (3, 16, 16)))
    assert att.tuned
    assert not [key for key in att.tuned if "idle" in key or "unused" in key]


@pytest.mark.filterwarnings("ignore:the classifier of Poolers:UserWarning")
def test_an_adapter_that_was_saved_with_unused_values_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Poolers()
    sites = petune.find_sites(model, (3, 16, 16))
    with monkeypatch.context() as patch:  # as development versions did
        patch.setattr(petune.Edit, "used", lambda edit, parameters: list(parameters))
        att = petune.attach(model, "bitfit", sites=sites)
    assert "idle.bias" in att.tuned
    with torch.no_grad():
        att.tuned["body.norm.bias"].add_(1)
    att.save(tmp_path / "out")
    fresh = Poolers()
    fresh.load_state_dict({key: t for key, t in model.state_dict().items() if "petune" not in key})
    with torch.no_grad():
        fresh.body.norm.bias.sub_(1)
    loaded = petune.load(fresh, tmp_path / "out")
    assert "idle.bias" not in loaded.tuned
    with torch.no_grad():
        assert torch.equal(fresh(X), model(X))
        loaded.detach()
        fresh.idle.bias.add_(1)
    with pytest.raises(petune.BackboneMismatch):
        petune.load(fresh, tmp_path / "out")


def every_bias_gets_a_gradient(model: nn.Module, method: str) -> None:
    att = petune.attach(model, method)
    output = model(torch.randn(2, *att.sites.input_size))
    getattr(output, "logits", output).square().sum().backward()
    assert [key for key, p in att.tuned.items() if p.grad is None] == []


@pytest.mark.parametrize("method", ["bitfit", "norm"])
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"])
def test_every_trained_value_of_timm_gets_a_gradient(name: str, method: str) -> None:
    small = {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4), "img_size": 64, "window_size": 4}
    column = {"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 4, "patch_size": 14}
    every_bias_gets_a_gradient(timm.create_model(name, num_classes=3, **(small if "swin" in name else column)), method)


@pytest.mark.parametrize("method", ["bitfit", "norm"])
@pytest.mark.parametrize("family", ["CLIP", "Dinov2"])
def test_every_trained_value_of_transformers_gets_a_gradient(family: str, method: str) -> None:
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    shape = {**small, "image_size": 32, "patch_size": 8}
    if family == "CLIP":  # its post-layernorm is called, but the mean of the tokens before it is classified
        config: Any = transformers.CLIPConfig(vision_config=shape, num_labels=3)
        every_bias_gets_a_gradient(transformers.CLIPForImageClassification(config), method)
    else:
        config = transformers.Dinov2Config(**shape, num_labels=3)
        every_bias_gets_a_gradient(transformers.Dinov2ForImageClassification(config), method)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_checkpointed_layers_count_as_used() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Poolers):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(checkpoint(self.body, x + self.bias, use_reentrant=True))

    model = Checkpointed()
    att = petune.attach(model, "bitfit", sites=petune.find_sites(model, (3, 16, 16)))
    assert "body.blocks.0.attn.qkv.bias" in att.tuned
