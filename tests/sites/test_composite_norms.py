"""Norms of several modules, of which the one that computes has no weights, are norms like others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from survey.pairs import examine
from torch import Tensor, nn

import petune
from tests.tiny import module_beside

models = module_beside(__file__, "uncommon_structures")
SplitAttention = module_beside(__file__, "handwritten_models").SplitAttention


class Affine(nn.Module):
    """A factor that starts at 0, and a shift, for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.zeros(models.D)), nn.Parameter(torch.zeros(models.D))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.g + 1) + self.b


class Gamma(nn.Module):
    """A norm without weights, then one factor for each channel."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.inner, self.gamma = norm(models.D, elementwise_affine=False), nn.Parameter(torch.ones(models.D))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.gamma


NORMS: dict[str, Callable[[], nn.Module]] = {
    "gamma": Gamma,
    "rms": lambda: Gamma(nn.RMSNorm),
    "sequential": lambda: nn.Sequential(nn.LayerNorm(models.D, elementwise_affine=False), Affine()),
}


class Layers(nn.Module):
    """Layers of lists: norm, attention, norm, MLP."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        parts = lambda: [make(), SplitAttention(), make(), models.mlp()[1:]]  # noqa: E731
        self.layers = nn.ModuleList(nn.ModuleList(parts()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm1, attn, norm2, mlp in self.layers:
            x = attn(norm1(x)) + x
            x = mlp(norm2(x)) + x
        return x


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return models.Vit(Layers(NORMS[name]), norm=NORMS[name]()).eval()


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_of_several_modules_is_a_site(name: str) -> None:
    sites = petune.find_sites(build(name))
    assert [{role: site.path for role, site in block.parts.items()} for block in sites.blocks] == [
        {
            "attn": f"trunk.layers.{i}.1",
            "mlp": f"trunk.layers.{i}.3",
            "norm1": f"trunk.layers.{i}.0",
            "norm2": f"trunk.layers.{i}.2",
            "mid": f"trunk.layers.{i}.2",
        }
        for i in range(2)
    ]
    assert sites.norm is not None
    assert sites.norm.path == "last"


@pytest.mark.parametrize("method", ["adaptformer:bottleneck=4", "ssf", "partial"])
def test_methods_work_next_to_it(method: str) -> None:
    outcome = examine(build("gamma"), method)
    assert outcome.state == "ok", outcome.detail


@pytest.mark.parametrize("name", NORMS)
def test_norm_tuning_trains_its_weights(name: str) -> None:
    model = build(name)
    vectors = {key for key, p in model.named_parameters() if p.ndim == 1 and not key.endswith("bias")}
    assert {*petune.attach(model, "norm").tuned} == vectors
