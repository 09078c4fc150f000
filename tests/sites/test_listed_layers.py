"""Layers that are lists of several attentions and an MLP are one block each."""

from __future__ import annotations

import pytest
from survey.pairs import examine
from torch import Tensor, nn

import petune
from tests.tiny import module_beside

models = module_beside(__file__, "uncommon_structures")


class TwoAttentions(nn.Module):
    """A loop over (attention, attention, MLP), as in TimeSformer."""

    def __init__(self) -> None:
        super().__init__()
        parts = lambda: [models.Attention(), models.Attention(), models.mlp()]  # noqa: E731
        self.layers = nn.ModuleList(nn.ModuleList(parts()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for time, space, feed in self.layers:
            x = time(x) + x
            x = space(x) + x
            x = feed(x) + x
        return x


class Factorized(TwoAttentions):
    """The first attention is within rows, the second within columns, as in ViViT."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (4, 4))
        for rows, columns, feed in self.layers:
            x = x.flatten(0, 1)
            x = rows(x) + x
            x = x.unflatten(0, (-1, 4)).transpose(1, 2).flatten(0, 1)
            x = columns(x) + x
            x = feed(x) + x
            x = x.unflatten(0, (-1, 4)).transpose(1, 2)
        return x.flatten(1, 2)


class Separate(nn.Module):
    """Lists of two attentions and lists of two MLPs take turns, as in axial attention."""

    def __init__(self) -> None:
        super().__init__()
        pairs: list[list[nn.Module]] = []
        for _ in range(2):
            pairs += [[models.Attention(), models.Attention()], [models.mlp(), models.mlp()]]
        self.layers = nn.ModuleList(map(nn.ModuleList, pairs))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in self.layers:
            x = first(x) + x
            x = second(x) + x
        return x


TRUNKS = {"two attentions": TwoAttentions, "factorized": Factorized, "separate": Separate}


@pytest.mark.parametrize("name", TRUNKS)
def test_each_layer_is_a_block(name: str) -> None:
    model = models.Vit(TRUNKS[name]()).eval()
    sites = petune.find_sites(model)
    lists = [["trunk.layers.0"], ["trunk.layers.1"]]
    mlps = [[".2"], [".2"]]
    if name == "separate":
        lists = [["trunk.layers.0", "trunk.layers.1"], ["trunk.layers.2", "trunk.layers.3"]]
        mlps = [[".0", ".1"]] * 2
    for block, paths, ends in zip(sites.blocks, lists, mlps, strict=True):
        attns = [f"{paths[0]}.0", f"{paths[0]}.1"]
        assert [site.path for site in block.branches] == [*attns, *(f"{paths[-1]}{end}" for end in ends)]
    att = petune.attach(model, "partial")
    last = {key for key in dict(model.named_parameters()) if key.startswith((*lists[1], "last."))}
    assert {*att.tuned} == last


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("method", ["adaptformer:bottleneck=4", "houlsby"])
def test_methods_reach_all_sublayers(name: str, method: str) -> None:
    outcome = examine(models.Vit(TRUNKS[name]()).eval(), method)
    is_refused = name == "separate" and "adaptformer" in method  # it has two MLPs
    assert outcome.state == ("refused" if is_refused else "ok"), outcome.detail


class Sandwich(nn.Module):
    """Attentions first, then MLPs: no list holds a block."""

    def __init__(self) -> None:
        super().__init__()
        parts = [models.Attention(), models.Attention(), models.Attention(), models.mlp(), models.mlp(), models.mlp()]
        self.layers = nn.ModuleList(nn.ModuleList([part]) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        for (layer,) in self.layers:
            x = layer(x) + x
        return x


def test_a_transformer_is_not_one_block() -> None:
    model = models.Vit(Sandwich()).eval()
    assert "trunk" not in [block.path for block in petune.find_sites(model).blocks]
