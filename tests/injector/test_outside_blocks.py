"""Attentions and MLPs that are in no block are named, and so are new layers of heads for masks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import petune

D = 8


def block() -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 16, 0.0, batch_first=True, norm_first=True)


class Crossing(nn.Module):
    """Two blocks, and then attention of the first token to all, which is in no block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])
        self.cross = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        for inner in self.blocks:
            x = inner(x)
        first = x[:, :1] + self.cross(x[:, :1], x, x, need_weights=False)[0]
        return torch.cat([first, x[:, 1:]], 1)


class Further(nn.Module):
    """Two blocks, each with an MLP after it whose input is no stream: nothing is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for inner, mlp in zip(self.blocks, self.mlps, strict=True):
            x = mlp(inner(x))
        return x


class Gated(nn.Module):
    """Two blocks, and between them a convolution whose channels are gated by what all tokens hold."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])
        self.conv, self.gate = nn.Conv2d(D, D, 3, padding=1), Gate(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        x = x + self.gate(self.conv(x.mT.unflatten(2, (4, 4)))).flatten(2).mT
        return self.blocks[1](x)


class Gate(nn.Module):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=isinstance(self.layers[0], nn.Conv2d))
        return x * self.layers(pooled).sigmoid().view(len(x), -1, 1, 1)


class Vit(nn.Module):
    image_size = 16

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.stem, self.trunk = nn.Conv2d(3, D, 4, 4), trunk
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.trunk(self.stem(x).flatten(2).mT))[:, 0])


@pytest.mark.parametrize("method", ["houlsby", "adaptformer:bottleneck=2", "partial"])
def test_attention_between_no_blocks_is_named(method: str) -> None:
    with pytest.warns(UserWarning, match=r"stay as they are: trunk\.cross"):
        petune.attach(Vit(Crossing()).eval(), method)


@pytest.mark.parametrize("make", [nn.Linear, lambda n, m: nn.Conv2d(n, m, 1)], ids=["linear", "convolutions"])
def test_a_gate_of_channels_between_blocks_is_not_named(make: Callable[[int, int], nn.Module]) -> None:
    layers = nn.Sequential(make(D, 4), nn.SiLU(), make(4, D))
    petune.attach(Vit(Gated(layers)).eval(), "houlsby")  # a warning fails the tests


def test_loading_does_not_repeat_what_attaching_has_told(tmp_path: Path) -> None:
    for build, method in ((lambda: Vit(Crossing()), "houlsby"), (Masks, "linear")):
        torch.manual_seed(0)
        model = build().eval()
        fresh = copy.deepcopy(model)
        with pytest.warns(UserWarning, match="stay"):
            petune.attach(model, method).save(tmp_path / method)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            petune.load(fresh, tmp_path / method)


def test_methods_that_reach_it_or_edit_no_block_name_nothing() -> None:
    model = Vit(Crossing()).eval()
    for method, head in (("linear", None), ("full", None), ("bitfit", None), ("houlsby", ["head", "trunk.cross"])):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            petune.attach(model, method, head=head).detach()


def test_mlps_that_are_in_no_block_are_named() -> None:
    with pytest.warns(UserWarning, match=r"stay as they are: trunk\.mlps\.0, trunk\.mlps\.1\."):
        att = petune.attach(Vit(Further()).eval(), "houlsby")
    assert att.sites.norm.path == "norm"  # and not that inside of the last MLP


class Extra(Vit):
    """A layer before or between two blocks, written in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__(nn.ModuleList([block(), block()]))
        self.kind = kind
        self.up, self.down, self.conv = nn.Linear(D, 2 * D), nn.Linear(D, D), nn.Conv1d(D, D, 3, padding=1)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.qkv, self.out = nn.Parameter(torch.randn(3 * D, D)), nn.Parameter(torch.randn(D, D))

    def between(self, x: Tensor) -> Tensor:
        if self.kind == "gated":
            value, gate = self.up(x).chunk(2, -1)
            return x + self.down(value * gate.sigmoid())
        if self.kind == "functional attention":
            q, k, v = (x @ self.qkv.T).chunk(3, -1)
            return x + nn.functional.scaled_dot_product_attention(q, k, v)
        if self.kind == "functional MLP":
            return x + nn.functional.linear(nn.functional.gelu(x @ self.out), self.out)
        layers = {"linear": self.down, "MLP": self.mlp, "convolution": lambda x: self.conv(x.mT).mT}
        return layers.get(self.kind, nn.Identity())(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        x = x + self.mlp(x) if self.kind == "MLP before" else x
        x = self.trunk[1](self.between(self.trunk[0](x)))
        return self.head(self.norm(x)[:, 0])


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("gated", "up, down"),
        ("functional attention", "qkv"),
        ("functional MLP", "out"),
        ("linear", "down"),
        ("MLP", "mlp"),
        ("MLP before", "mlp"),
    ],
)
def test_layers_before_and_between_blocks_are_named(kind: str, named: str) -> None:
    with pytest.warns(UserWarning, match=rf"stay as they are: {named}\."):
        petune.attach(Extra(kind).eval(), "houlsby")


@pytest.mark.parametrize("kind", ["convolution", "none"])
def test_convolutions_between_blocks_are_not_named(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        petune.attach(Extra(kind).eval(), "houlsby")


class Late(Vit):
    """Self-attention with a norm of its own after the final norm; without an MLP it is no block."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(block(), block()))
        self.pre, self.late = nn.LayerNorm(D), nn.MultiheadAttention(D, 2, batch_first=True)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.trunk(self.stem(x).flatten(2).mT))
        y = self.pre(x)
        return self.head((x + self.late(y, y, y, need_weights=False)[0])[:, 0])


@pytest.mark.parametrize("method", ["partial", "adaptformer:bottleneck=2"])
def test_attention_after_the_final_norm_is_named_and_the_norm_is_found(method: str) -> None:
    with pytest.warns(UserWarning, match=r"stay as they are: late\."):
        att = petune.attach(Late().eval(), method)
    assert len(att.sites.blocks) == 2
    assert att.sites.norm.path == "norm"
    if method == "partial":
        assert {key.partition(".")[0] for key in att.tuned} == {"trunk", "norm", "pre"}


class Masks(nn.Module):
    """Queries attend to patches; each makes a mask by its product with features of the pixels."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, D, 4, 4), nn.Sequential(block(), block())
        self.queries, self.pixels = nn.Parameter(torch.randn(1, 5, D)), nn.Conv2d(D, D, 1)
        self.decoder = nn.TransformerDecoderLayer(D, 2, 16, 0.0, batch_first=True)
        self.classes, self.masks = nn.Linear(D, 3), nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(self.stem(x).flatten(2).mT)
        pixels = self.pixels(x.mT.unflatten(2, (4, 4)))
        queries = self.decoder(self.queries.expand(len(x), -1, -1), x)
        return self.classes(queries), torch.einsum("bqd, bdhw -> bqhw", self.masks(queries), pixels)


def test_pixel_features_and_queries_of_a_mask_head_are_named() -> None:
    with pytest.warns(UserWarning, match="stay frozen unless the method trains them: pixels, decoder, queries"):
        petune.attach(Masks().eval(), "linear")
