"""Heads that a user names train, are saved and loaded; heads of several tasks, towers and kinds are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import petune
from tests.tiny import X, randomised, tiny


class Tasks(nn.Module):
    """Several heads on one body; `how` says what the forward returns."""

    img_size = 16

    def __init__(self, how: str, **heads: nn.Module) -> None:
        super().__init__()
        self.body: Any = tiny()
        self.body.reset_classifier(0)
        self.other: Any = tiny() if how == "towers" else None
        if self.other is not None:
            self.other.reset_classifier(0)
        self.how = how
        self.heads = nn.ModuleDict(heads)

    def forward(self, x: Tensor) -> Any:
        if self.how == "map":  # a convolution on the grid of tokens, averaged
            (head,) = self.heads.values()
            return head(self.body.forward_features(x)[:, 1:].mT.unflatten(2, (4, -1))).mean((2, 3))
        if self.how == "mixed":
            tokens = self.body.forward_features(x)
            pixels = self.heads["pixels"](tokens[:, 1:].mT.unflatten(2, (4, -1)))
            return self.heads["label"](tokens[:, 0]), nn.functional.interpolate(pixels, scale_factor=4)
        features = [self.body(x)] * len(self.heads)
        if self.other is not None:
            first = self.heads["a"](features[0])
            return first, self.heads["b"](self.other(x))
        outputs = {name: head(f) for (name, head), f in zip(self.heads.items(), features, strict=True)}
        return outputs if self.how == "dict" else tuple(outputs.values())


def mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(24, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, outputs))


def models() -> dict[str, nn.Module]:
    """Models all of whose heads are to train."""
    torch.manual_seed(0)
    normed = parametrizations.weight_norm(nn.Linear(24, 3))
    return {
        "dict": Tasks("dict", color=nn.Linear(24, 3), shape=nn.Linear(24, 4)),
        "tuple of MLPs": Tasks("tuple", color=mlp(3), shape=mlp(4)),
        "towers": Tasks("towers", a=nn.Linear(24, 4), b=nn.Linear(24, 4)),
        "label and map": Tasks("mixed", label=nn.Linear(24, 3), pixels=nn.Conv2d(24, 2, 1)),
        "convolution": Tasks("map", map=nn.Conv2d(24, 3, 1)),
        "weight norm": Tasks("tuple", normed=normed),
        "spectral norm": Tasks("tuple", normed=parametrizations.spectral_norm(nn.Linear(24, 3))),
    }


def test_every_head_of_every_kind_trains() -> None:
    for kind, model in models().items():
        att = petune.attach(model.eval(), "linear")
        assert set(att.head) == {key for key, _ in model.named_parameters() if key.startswith("heads.")}, kind
        groups = att.param_groups(head_lr=0.5)
        assert {group["lr"] for group in groups} == {0.5}, kind
        assert sum(len(group["params"]) for group in groups) == len(att.head), kind
        output = model(X)
        tensors = output.values() if isinstance(output, dict) else output
        sum((y.square().mean() for y in tensors), torch.zeros(())).backward()
        att.check_gradients()


def test_heads_are_named_by_path_module_and_pattern(tmp_path: Path) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        return Tasks("tuple", color=mlp(3), shape=mlp(4)).eval()

    model = build()
    for choice in ("heads.*", ["heads.color", model.heads["shape"]], ["heads.color.*", "heads.color", "heads.shape"]):
        att = petune.attach(model, "adaptformer", bottleneck=2, head=choice)
        assert sorted(att.sites.chosen_head or ()) == ["heads.color", "heads.shape"], choice
        att.detach()
    att = randomised(petune.attach(model, "adaptformer", bottleneck=2, head=["heads.color", "body.norm", "heads.s*"]))
    att.save(tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config.get("petune", config)["chosen_sites"]["head"] == ["heads.color", "body.norm", "heads.shape"]
    loaded = petune.load(build(), tmp_path / "out")
    assert loaded.head.keys() == att.head.keys()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(loaded.model(X), model(X), strict=True))
    second = petune.attach(model, "lora", name="second", head="heads")
    assert {*second.head} == {key for key in att.head if key.startswith("heads.")}
    with pytest.raises(petune.AttachError, match="several heads"):
        petune.AdapterBank(build())


def test_a_wrong_head_is_refused_with_what_is_near() -> None:
    model = Tasks("tuple", color=nn.Linear(24, 3))
    with pytest.raises(petune.AttachError, match=r"heads\.color"):
        petune.attach(model, "linear", head="heads.colour")
    wrong: list[Any] = ["", model, nn.Linear(2, 2), "body.*.nothing"]
    for head in wrong:
        with pytest.raises(petune.AttachError):
            petune.attach(model, "linear", head=head)
    misused: list[dict[str, Any]] = [{"head": []}, {"head": 3}, {"head": "heads.color", "train_head": False}]
    for options in misused:
        with pytest.raises(petune.UsageError):
            petune.attach(model, "linear", **options)
    assert not any(hasattr(m, "is_petune_module") for m in model.modules())


def test_a_head_that_shares_its_weights_with_a_block_is_told() -> None:
    shared = nn.Linear(24, 24, bias=False)
    model = Tasks("tuple", shared=shared)
    shared.weight = model.body.blocks[1].attn.proj.weight
    with pytest.warns(UserWarning, match="shares"):
        petune.attach(model, "linear")


class Captions(nn.Module):
    """Predicts words by the embedding that its inputs are looked up in."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(5, 24), nn.Linear(24, 5, bias=False)
        self.blocks = nn.Sequential(*(timm.models.vision_transformer.Block(24, 2) for _ in range(2)))
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.words(ids)))
        return logits


def test_a_head_that_shares_its_weights_with_the_embedding_of_the_inputs_is_told() -> None:
    with pytest.warns(UserWarning, match="shares weights with words"):
        petune.attach(Captions(), "adaptformer", example=torch.zeros(2, 6, dtype=torch.long))
    petune.attach(Captions(), "adaptformer", example=torch.zeros(2, 6, dtype=torch.long), train_head=False)


def test_a_tower_is_chosen_in_the_method_text(tmp_path: Path) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        return Tasks("towers", a=nn.Linear(24, 4), b=nn.Linear(24, 4)).eval()

    model = build()
    att = randomised(petune.attach(model, "adaptformer:bottleneck=2,blocks=in:other"))
    assert att.tuned
    assert all(key.startswith("other.") for key in att.tuned)
    att.save(tmp_path / "out")
    loaded = petune.load(build(), tmp_path / "out")
    assert loaded.tuned.keys() == att.tuned.keys()
    with pytest.raises(petune.ConfigError, match=r"body\.blocks"):
        petune.attach(build(), "adaptformer:blocks=in:nowhere")
