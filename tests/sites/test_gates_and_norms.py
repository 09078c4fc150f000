"""Unusual blocks: gates, norms of any class or in lists after the sums, MLPs in series, shared modules."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petune
from tests.sites.branching_blocks import Attention, D, mlp


class Gated(nn.Module):
    """Each branch is multiplied by a gate that reads the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2, self.attn, self.mlp = nn.LayerNorm(D), nn.LayerNorm(D), Attention(), mlp()
        self.g1, self.g2 = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.g1(x).sigmoid() * self.attn(self.n1(x))
        return x + self.g2(x).sigmoid() * self.mlp(self.n2(x))


class RootMeanSquare(nn.Module):
    """A norm whose class has no telling name and no `eps`."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gain


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2, self.attn, self.mlp = RootMeanSquare(), RootMeanSquare(), Attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.n1(x))
        return x + self.mlp(self.n2(x))


class FunctionalNorms(Plain):
    """The weights of the norms are parameters of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.n1 = self.n2 = nn.Identity()  # type: ignore[assignment]
        self.w1, self.w2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(F.layer_norm(x, (D,), self.w1))
        return x + self.mlp(F.layer_norm(x, (D,), self.w2))


class WrittenOut(FunctionalNorms):
    """The norms are arithmetic of the block."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) * self.w1)
        return x + self.mlp((x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) * self.w2)


class MlpsInSeries(Plain):
    """The second MLP reads the sum that the first one is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.n3, self.second = nn.LayerNorm(D), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.second(self.n3(x))


class Vit(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, D, 4, 4), nn.Sequential(block(), block())
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.patches(x).flatten(2).mT)).mean(1))
        return logits


class PostNormInLists(nn.Module):
    """Normalize after each sum; attentions, MLPs and norms are in lists, so that no block is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, D, 4, 4), nn.Linear(D, 3)
        self.attns, self.mlps = nn.ModuleList([Attention(), Attention()]), nn.ModuleList([mlp(), mlp()])
        self.n1, self.n2 = (nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D)]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        for attn, ff, n1, n2 in zip(self.attns, self.mlps, self.n1, self.n2, strict=True):
            x = n1(x + attn(x))
            x = n2(x + ff(x))
        logits: Tensor = self.head(x.mean(1))
        return logits


IMAGE = torch.zeros(1, 3, 16, 16)


def test_two_gates_are_no_mlp() -> None:
    sites = petune.find_sites(Vit(Gated), example=IMAGE)
    assert [(site.role, site.path) for site in sites.blocks[0].branches] == [
        ("attn", "blocks.0.attn"),
        ("mlp", "blocks.0.mlp"),
    ]


def test_a_norm_after_a_sum_belongs_to_the_block_of_that_sum() -> None:
    blocks = petune.find_sites(PostNormInLists(), example=IMAGE).blocks
    assert [[norm.path for norm in block.norms] for block in blocks] == [["n1.0", "n2.0"], ["n1.1", "n2.1"]]
    assert not any(block.norm_first for block in blocks)
    att = petune.attach(PostNormInLists(), "norm", example=IMAGE, blocks=[1])
    assert {key.rpartition(".")[0] for key in att.tuned} == {"n1.1", "n2.1"}


def test_an_adapter_parallel_to_the_first_of_two_mlps_enters_the_second() -> None:
    model = Vit(MlpsInSeries).eval()
    att = petune.attach(model, "adaptformer", example=IMAGE, dropout=0.0)
    block = model.blocks[0]
    seen: list[Tensor] = []
    block.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    adapter = att.edit_log.placed[0][0].adapter
    nn.init.normal_(adapter.up.weight)  # type: ignore[union-attr,arg-type]
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
        x, y = seen
        with att.disabled():
            x = x + block.attn(block.n1(x))
            x = x + block.mlp(block.n2(x)) + adapter(x)
            expected = x + block.second(block.n3(x))
    torch.testing.assert_close(y, expected)


def test_norms_of_any_class_train() -> None:
    att = petune.attach(Vit(Plain), "norm", example=IMAGE)
    gains = {f"blocks.{i}.n{k}.gain" for i in (0, 1) for k in (1, 2)}
    assert {*att.tuned} == gains | {"norm.weight", "norm.bias"}


def test_norms_that_are_functions_train() -> None:
    att = petune.attach(Vit(FunctionalNorms), "norm", example=IMAGE)
    assert {*att.tuned} == {f"blocks.{i}.w{k}" for i in (0, 1) for k in (1, 2)} | {"norm.weight", "norm.bias"}
    last = petune.attach(Vit(FunctionalNorms), "norm", example=IMAGE, blocks="last:1")
    assert {*last.tuned} == {"blocks.1.w1", "blocks.1.w2", "norm.weight", "norm.bias"}


def test_blocks_without_a_norm_that_trains_are_named() -> None:
    with pytest.warns(UserWarning, match=r"norm trains nothing in 2 of 2 blocks \(blocks\.0, …\)"):
        petune.attach(Vit(WrittenOut), "norm", example=IMAGE)


def test_a_frozen_block_that_shares_modules_with_one_that_trains_is_named() -> None:
    model = Vit(Plain)
    model.blocks[1].n1 = model.blocks[0].n1
    with pytest.warns(UserWarning, match=r"^blocks\.0 shares parameters"):
        petune.attach(model, "partial", example=IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        petune.attach(Vit(Plain), "partial", example=IMAGE)
