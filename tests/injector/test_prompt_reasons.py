"""A refusal of prompts says what was found in the block, and prompts have no positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petune
from tests.tiny import tiny


class Relative(nn.Module):
    """Attention with a bias for each offset of two tokens, which are numbered in the forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj, self.bias = inner.qkv, inner.proj, nn.Parameter(torch.randn(99, 2))

    def forward(self, x: Tensor, **_: object) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        numbers = torch.arange(x.shape[1], device=x.device)
        bias = self.bias[numbers[:, None] - numbers + 49].permute(2, 0, 1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


class Channels(Relative):
    """Attention of channels to channels."""

    def forward(self, x: Tensor, **_: object) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 4, 1)
        return self.proj(((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2))


class Changed(nn.Module):
    """A block with a further operation on its tokens."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = inner.norm1, inner.attn, inner.norm2, inner.mlp
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        x = self.change(x)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def centered(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def changed_in_place(x: Tensor) -> Tensor:
    x *= 1.5
    return x


def model_with(
    attention: Callable[[nn.Module], nn.Module] | None, block: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Return a ViT without a class token, of changed blocks."""
    model = tiny(depth=1, class_token=False, global_pool="avg")
    if attention is not None:
        model.blocks[0].attn = attention(model.blocks[0].attn)
    model.blocks = nn.Sequential(block(model.blocks[0]))
    return model.eval()


def weakened(x: Tensor) -> Tensor:
    """Return the tokens with a share of them set to zero."""
    return torch.cat([x[:, : x.shape[1] // 2], 0 * x[:, x.shape[1] // 2 :]], 1)


CASES = {
    "relative": (Relative, nn.Sequential, r"gives each prompt a position among the tokens"),
    "channels": (Channels, nn.Sequential, r"16 tokens enter, but its attention is over 12 channels"),
    "centered": (None, lambda b: Changed(b, centered), r"what the prompts contain reaches others though none attends"),
    "in place": (None, lambda b: Changed(b, changed_in_place), r"changes the tokens that enter it in place"),
    "weakened": (None, lambda b: Changed(b, weakened), r"computes something else .* though none attends to these\. "),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reason_is_the_one_that_was_found(name: str) -> None:
    attention, block, reason = CASES[name]
    with pytest.raises(petune.AttachError, match=rf"cannot take prompts: it .*{reason}"):
        petune.attach(model_with(attention, block), "vpt")


class Numbered(Changed):
    """A block that is given the offset of each pair of tokens, as DeBERTa's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner, lambda x: x)
        self.bias = nn.Parameter(torch.randn(99))

    def forward(self, x: Tensor, relative_pos: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), attn_mask=self.bias[relative_pos + 49])
        return x + self.mlp(self.norm2(x))


class Numbering(nn.Module):
    """Numbers the tokens once for all blocks."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = Numbered(block)

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.arange(x.shape[1], device=x.device)
        return self.block(x, numbers[:, None] - numbers)


@pytest.mark.parametrize("deep", [True, False])
def test_relative_positions_that_a_block_is_given_are_refused(deep: bool) -> None:
    with pytest.raises(petune.AttachError, match=r"relative positions of its tokens as whole numbers \(argument 1\)"):
        petune.attach(model_with(None, Numbering), "vpt", deep=deep)


class OfList(nn.Module):
    """A block that takes what the blocks before it returned, as a list."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, history: list[Tensor]) -> Tensor:
        x: Tensor = history[-1]
        x = x + self.inner.attn(self.inner.norm1(x))
        return x + self.inner.mlp(self.inner.norm2(x))


class OverLists(nn.Module):
    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        inner = tiny().blocks
        self.stem, self.blocks = nn.Conv2d(3, 24, 4, 4), nn.ModuleList(OfList(block) for block in inner)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        history = [self.stem(x).flatten(2).mT]
        for block in self.blocks:
            history.append(block(history))
        return self.head(history[-1].mean(1))


def test_a_block_that_takes_a_list_is_refused_with_that() -> None:
    with pytest.raises(petune.AttachError, match="cannot take prompts: it is called with a list"):
        petune.attach(OverLists().eval(), "vpt")
