"""A block may have several MLPs, each for some of its tokens: a method that adapts one names the others."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petune

D = 16
IMAGE, TEXT = torch.zeros(2, 3, 16, 16), torch.zeros(2, 6, dtype=torch.long)


def mlp() -> nn.Module:
    return timm.layers.Mlp(D, 32)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn, self.mlp, self.other = timm.layers.Attention(D, 2), mlp(), mlp()


class Multiway(Norms):
    """BEiT-3: an MLP for the first six tokens, which are text, and one for the others."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.cat([y, x], 1)
        z = z + self.attn(self.norm1(z))
        text, image = z[:, :6], z[:, 6:]
        z = torch.cat([text + self.mlp(self.norm2(text)), image + self.other(self.norm3(image))], 1)
        return z[:, 6:], z[:, :6]


class OneRow(Norms):
    """The same for one row of tokens, of which the first is a class token."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y = self.norm2(x)
        return x + torch.cat([self.mlp(y[:, :1]), self.other(y[:, 1:])], 1)


class Joint(Norms):
    """MMDiT: two streams that attend together."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Identity()
        self.qkv_x, self.qkv_y = nn.Linear(D, 3 * D), nn.Linear(D, 3 * D)
        self.out_x, self.out_y = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        qkv = torch.cat([self.qkv_y(self.norm1(y)), self.qkv_x(self.norm1(x))], 1)
        q, k, v = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y, x = y + self.out_y(z[:, :6]), x + self.out_x(z[:, 6:])
        return x + self.mlp(self.norm2(x)), y + self.other(self.norm3(y))


class Parallel(Norms):
    """Both MLPs read all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x)) + self.other(self.norm3(x))


class Vit(nn.Module):
    def __init__(self, block: type[Norms]) -> None:
        super().__init__()
        self.stem, self.words = nn.Conv2d(3, D, 4, 4), nn.Embedding(9, D)
        self.blocks = nn.ModuleList([block(), block()])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        x = self.stem(image).flatten(2).mT
        if text is None:
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x).mean(1))
        y = self.words(text)
        for block in self.blocks:
            x, y = block(x, y)
        return self.head(self.norm(torch.cat([y, x], 1)).mean(1))


def example(block: type[Norms]) -> tuple[Tensor, ...]:
    return (IMAGE,) if block in (OneRow, Parallel) else (IMAGE, TEXT)


def attached(block: type[Norms], method: str) -> tuple[petune.Attachment, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        att = petune.attach(Vit(block).eval(), method, example=example(block))
    return att, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("block", "method"),
    [
        (Multiway, "pfeiffer"),
        (OneRow, "adaptformer:input=norm"),
        (OneRow, "houlsby"),
        (OneRow, "lora"),
        (OneRow, "ssf"),
        (OneRow, "peft:type=ia3"),
        (Joint, "adaptformer"),
        (Joint, "pfeiffer"),
        (Joint, "pfeiffer:position=post"),
        (Joint, "lst"),
    ],
)
def test_the_mlp_that_is_left_out_is_named_once(block: type[Norms], method: str) -> None:
    _, messages = attached(block, method)
    one, both = ["mlp", "other"], [f"blocks.{i}" for i in range(2)]
    named = [m for m in messages if "other" in m and "head" not in m]
    assert len(named) == 1
    assert all(f"{path}.{name}" in named[0] for path in both for name in one)


@pytest.mark.parametrize("method", ["bitfit", "norm", "partial", "lst", "lora:targets=attn", "pfeiffer:position=post"])
def test_methods_that_reach_all_tokens_do_not_warn(method: str) -> None:
    assert not [m for m in attached(OneRow, method)[1] if "several MLPs" in m]


@pytest.mark.parametrize("method", ["adaptformer", "houlsby", "lora"])
def test_mlps_for_the_same_tokens_are_not_split(method: str) -> None:
    att, messages = attached(Parallel, method)
    assert not [m for m in messages if "several MLPs" in m]
    assert all(not block.split_mlps for block in att.sites.blocks)


def test_loading_does_not_repeat_the_advice_on_mlps(tmp_path: Path) -> None:
    model = Vit(OneRow).eval()
    fresh = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="several MLPs"):
        petune.attach(model, "houlsby", example=IMAGE).save(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        petune.load(fresh, tmp_path / "a")
