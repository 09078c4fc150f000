"""Attachments in the user's own training code: own models, autocast, parts of models, interrupted forwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import AttachError
from tests.tiny import X, randomised, tiny


def body() -> nn.Module:
    model = tiny()
    model.reset_classifier(0)
    return model


class Own(nn.Module):
    """A backbone with a classifier of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = body()
        torch.manual_seed(0)
        self.head = nn.Sequential(nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_layers_before_the_classifier_are_named_and_may_belong_to_it(tmp_path: Path) -> None:
    separate = Own()
    separate.neck, separate.head = separate.head[:2], separate.head[2]
    separate.forward = lambda x: separate.head(separate.neck(separate.backbone(x)))  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"head\. Further layers .* neck\.0\. "):
        assert list(petune.attach(separate, "adaptformer").head) == ["head.weight", "head.bias"]
    model = Own().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        petune.attach(Own(), "adaptformer", train_head=False)
        assert len(petune.attach(Own(), "adaptformer").head) == 4
        att = randomised(petune.attach(model, "adaptformer", sites=petune.find_sites(model, head="head")))
    assert list(att.head) == ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]
    att.save(tmp_path / "a")
    other = Own().eval()
    nn.init.zeros_(other.head[0].weight)  # its initial values are not part of the backbone
    petune.load(other, tmp_path / "a", sites=petune.find_sites(other, head="head"))
    assert torch.equal(other(X), model(X))
    with pytest.raises(AttachError, match="head='hed'"):
        petune.find_sites(model, head="hed")


class RMSNorm(nn.Module):
    """As Llama's in transformers, whose epsilon has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(24)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(24), RMSNorm])
def test_a_norm_of_tokens_before_the_classifier_counts_as_the_backbones(norm: Callable[[], nn.Module]) -> None:
    class Normed(Own):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = norm(), nn.LayerNorm(24)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.backbone.forward_features(x)
            return self.head((self.first(tokens) + self.last(tokens)).mean(1))

    with pytest.warns(UserWarning, match=r"head\.2\. Further layers") as caught:
        petune.attach(Normed(), "adaptformer", head="head.2", input_size=(3, 16, 16))
    assert not any("first" in str(warning.message) for warning in caught if "Further layers" in str(warning.message))


def test_a_part_and_its_whole_are_not_both_attached_to() -> None:
    net = nn.Sequential(body(), nn.Linear(24, 5))
    inner = petune.attach(net[0], "adaptformer", train_head=False)
    with pytest.raises(AttachError, match="attached already to 0"):
        petune.attach(net, "linear")
    assert all(p.requires_grad for p in inner.parameters())
    inner.detach()
    petune.attach(net, "linear")
    with pytest.raises(AttachError, match="the model that this is a part of"):
        petune.attach(net[0], "adaptformer", train_head=False)
    petune.attach(net, "adaptformer")


def test_a_backbone_in_two_models_gets_attachments_in_one() -> None:
    first = nn.Sequential(body(), nn.Linear(24, 5))
    second = nn.Sequential(nn.Identity(), first[0], nn.Linear(24, 5))
    att = petune.attach(first, "adaptformer")
    with pytest.raises(AttachError, match=r"another model|attached already to 1"):
        petune.attach(second, "adaptformer")
    assert all(p.requires_grad for p in att.parameters())


@pytest.mark.parametrize("method", ["adaptformer", "bitfit", "full"])
def test_disabled_inside_autocast_it_is_the_backbone(method: str) -> None:
    model = tiny()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(X)
    att = randomised(petune.attach(model, method))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with_it = model(X)
        with att.disabled():
            assert torch.equal(model(X), before)
        assert torch.equal(model(X), with_it)


def test_an_interrupted_forward_leaves_nothing_to_the_next() -> None:
    model = tiny()
    randomised(petune.attach(model, "lst"))
    whole = model(X)

    def full_memory(module: nn.Module, args: object) -> None:
        raise MemoryError

    handle = model.blocks[1].mlp.register_forward_pre_hook(full_memory)
    with pytest.raises(MemoryError):
        model(X)
    handle.remove()
    torch.testing.assert_close(model(X[:1]), whole[:1])


def test_another_classifier_than_the_one_it_was_made_under_is_not_saved(tmp_path: Path) -> None:
    model = tiny()
    att = petune.attach(model, "adaptformer", train_head=False)
    model.reset_classifier(7)
    with pytest.raises(AttachError, match=r"another classifier.* train_head=False"):
        att.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()
