"""Towers: rows of blocks of which none reads another are told apart by the flow of data, each with its final norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petune

D = 24


class Block(nn.Module):
    """A pre-norm block that may attend to a second row of tokens."""

    def __init__(self, dim: int = D) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        q = self.q(y).unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = self.kv(y if other is None else other).unflatten(-1, (2, 4, -1)).movedim(2, 0).transpose(2, 3)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Towers(nn.Module):
    """Towers for image and text, in different orders of the forward; `kind` says what is shared."""

    def __init__(self, kind: str, text_dim: int = D, text_depth: int = 2) -> None:
        super().__init__()
        self.kind, self.image_size = kind, 16
        self.stem, self.embed = nn.Conv2d(3, D, 4, 4), nn.Embedding(11, text_dim)
        self.image = nn.ModuleList(Block() for _ in range(2))
        self.text = nn.ModuleList(Block(text_dim) for _ in range(text_depth))
        self.shared = nn.ModuleList(Block() for _ in range(1 if kind == "shared" else 0))
        self.image_norm, self.text_norm = nn.LayerNorm(D), nn.LayerNorm(text_dim)

    def forward(self, image: Tensor, text: Tensor) -> Any:
        x, y = self.stem(image).flatten(2).mT, self.embed(text)
        if self.kind == "interleaved":
            for of_image, of_text in zip(self.image, self.text, strict=True):
                x, y = of_image(x), of_text(y)
            return self.image_norm(x).mean(1), self.text_norm(y).mean(1)
        if self.kind == "text first":
            y = self.text_norm(self._run(self.text, y))
            return self.image_norm(self._run(self.image, x)).mean(1), y.mean(1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.kind != "frozen"):
            x = self.image_norm(self._run([*self.shared, *self.image], x))
        if self.kind == "text reads image":
            for block in self.text:
                y = block(y, x)
            return self.text_norm(y).mean(1)
        buffer = torch.empty_like(y)  # an output that is written into
        buffer[:, :] = self._run([*self.shared, *self.text], y)
        return x.mean(1), self.text_norm(buffer).mean(1)

    def _run(self, blocks: Any, x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x


EXAMPLE = {"image": torch.randn(1, 3, 16, 16), "text": torch.zeros(1, 5, dtype=torch.long)}


def ends_of(sites: petune.Sites) -> list[tuple[str, int, str]]:
    return [(t.blocks[-1].path, len(t.blocks), t.norm.path if t.norm else "") for t in sites.towers]


def test_every_tower_has_its_own_last_block_and_norm() -> None:
    both = [("image.1", 2, "image_norm"), ("text.1", 2, "text_norm")]
    kinds = {"": both, "text first": both[::-1], "interleaved": both}
    for kind, expected in kinds.items():
        assert ends_of(petune.find_sites(Towers(kind), example=EXAMPLE)) == expected, kind
    uneven = petune.find_sites(Towers("", text_dim=16, text_depth=3), example=EXAMPLE)
    assert ends_of(uneven) == [both[0], ("text.2", 3, "text_norm")]
    shared = petune.find_sites(Towers("shared"), example=EXAMPLE)
    assert ends_of(shared) == [("image.1", 3, "image_norm"), ("text.1", 3, "text_norm")]


def test_a_decoder_that_reads_an_encoder_is_one_tower_with_it() -> None:
    sites = petune.find_sites(Towers("text reads image"), example=EXAMPLE)
    assert ends_of(sites) == [("text.1", 4, "text_norm")]
    assert sites.norm.path == "text_norm"


def test_a_plain_model_is_one_tower() -> None:
    model = nn.Sequential(nn.Conv2d(3, D, 4, 4), nn.Flatten(2), Turned(Block(), Block(), nn.LayerNorm(D)))
    (tower,) = petune.find_sites(model, (3, 16, 16)).towers
    assert (len(tower.blocks), tower.norm is not None) == (2, True)


class Turned(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT)


def test_the_norm_of_several_towers_is_refused_by_name() -> None:
    sites = petune.find_sites(Towers(""), example=EXAMPLE)
    assert "norm" not in sites.parts
    with pytest.raises(petune.SiteNotFound, match=r"image\.1, text\.1.*sites\.only"):
        _ = sites.norm
    assert ends_of(sites.only("text")) == [("text.1", 2, "")]


def test_methods_that_end_with_the_last_blocks_do_so_in_every_tower() -> None:
    model = Towers("", text_dim=16, text_depth=3)
    sites = petune.find_sites(model, example=EXAMPLE)
    expected = {
        "partial": {"image.1", "text.2", "image_norm", "text_norm"},
        "lora:blocks=last:1": {"image.1", "text.2"},
        "lst": {"image.1", "text.2"},
        "vpt:deep=false": {"image.0", "text.0"},
    }
    for method, holders in expected.items():
        att = petune.attach(model, method, sites=sites, train_head=False)
        keys = {".".join(key.split(".")[: 1 if key.split(".")[0].endswith("norm") else 2]) for key in att.tuned}
        assert keys == holders, method
        att.detach()
    chosen = [[b.path for b in sites.choose(f"last:{k}").blocks] for k in (1, 3)]
    assert chosen == [["image.1", "text.2"], ["image.0", "image.1", "text.0", "text.1", "text.2"]]
    with pytest.raises(petune.ConfigError, match="deepest tower"):
        sites.choose("last:4")


def test_a_tower_without_gradient_is_named() -> None:
    with pytest.warns(UserWarning, match=r"image\.1.*no_grad.*blocks=\[2, 3\]"):
        petune.attach(Towers("frozen"), "partial", example=EXAMPLE, train_head=False)
