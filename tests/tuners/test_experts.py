"""Experts that a router chooses for other images than the ones that petune tries are part of the MLP."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petune
from tests.tiny import randomised, tiny

D = 24
IMAGES = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 3


class Mlp(nn.Module):
    """Two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Experts(nn.Module):
    """An MLP of several, of which each token goes through one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(D, 6), nn.ModuleList(Mlp() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.gate(tokens).softmax(-1).max(-1)
        y = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            mine = (chosen == i).nonzero()[:, 0]
            if len(mine):
                y = y.index_add(0, mine, weights[mine, None] * expert(tokens[mine]))
        return y.view_as(x)


def mixture() -> nn.Module:
    return with_mlps(Experts)


def of_experts(att: petune.Attachment) -> set[tuple[str, str]]:
    """Block and expert of each tuned tensor of an expert."""
    paths = [key.split(".") for key in att.tuned if ".experts." in key]
    return {(path[path.index("blocks") + 1], path[path.index("experts") + 1]) for path in paths}


@pytest.mark.parametrize("method", ["lora", "peft:adalora", "ssf", "bitfit"])
def test_every_expert_gets_the_method(method: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        att = petune.attach(mixture(), method)
    assert len(of_experts(att)) == 2 * 6
    att.train()
    att.model(IMAGES[:1]).sum().backward()  # one image reaches a few experts
    att.check_gradients()
    att.model.eval()
    randomised(att).save(tmp_path / "a")
    again = mixture()
    petune.load(again, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(again(IMAGES), att.model(IMAGES))


class Alternatives(nn.Module):
    """An MLP of several, of which all inputs go through the same one; the forward reads a value, as routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.options = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.options[1](x.nan_to_num() if bool(x.isnan().any()) else x)


def with_mlps(kind: type[nn.Module]) -> nn.Module:
    model = tiny()
    torch.manual_seed(0)
    for block in model.blocks:
        block.mlp = kind()
    return model


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_siblings_that_no_input_reaches_are_named(method: str) -> None:
    with pytest.warns(
        UserWarning, match=r"also trains blocks\.0\.mlp\.options\.0, blocks\.0\.mlp\.options\.2, blocks\.1"
    ):
        petune.attach(with_mlps(Alternatives), method)


class Overlooked(Experts):
    """Experts of which the router never chooses the last two."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.gate.bias[4:] = -1e4


def test_the_check_of_a_method_asks_for_no_gradient_in_experts_without_tokens() -> None:
    assert "gradients" in petune.check_tuner("lora", with_mlps(Overlooked), r=2)


class Tilt(nn.Module):
    """Sends all tokens to the first expert."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(1e4 * torch.eye(6)[0])

    def forward(self, y: Tensor) -> Tensor:
        return y + self.shift


class Tilting(petune.Tuner[petune.TunerConfig]):
    """Trains the experts, and changes from the start which ones the router chooses."""

    recipe = petune.Recipe(lr=1e-3, weight_decay=0.0)
    identity_at_init = False

    def attach(self, edit: petune.Edit) -> None:
        for block in edit.model.blocks:
            edit.after(edit.site(block.mlp.gate, 6), Tilt())
            edit.train(block.mlp.experts.parameters())


@pytest.mark.parametrize("method", ["bitfit", "full", "partial", Tilting(petune.TunerConfig())])
def test_the_same_experts_are_named_whatever_a_method_does_at_the_start(method: str | Tilting) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the router chooses, so that it may choose all
        petune.attach(with_mlps(Overlooked), method)
