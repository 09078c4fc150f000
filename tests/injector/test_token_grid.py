"""Adapters that work on the grid of tokens see the grid of each call, at any image size."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.sites.any_input import D, Encoder
from tests.tiny import randomised, tiny

SIZES = [(16, 16), (24, 24), (16, 8), (8, 16), (32, 12), (12, 32)]


def image(rows: int, columns: int) -> Tensor:
    return torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(1))


def attached() -> petune.Attachment:
    torch.manual_seed(1)
    model = tiny(dynamic_img_size=True)
    nn.init.zeros_(model.pos_embed)  # so that a mirrored image gives mirrored tokens
    return randomised(petune.attach(model, "convpass", train_head=False))


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_convpass_convolves_the_grid_of_the_call(size: tuple[int, int]) -> None:
    """A model attached at another size computes what one that was attached at this size computes."""
    att = attached()
    model = att.model
    for other in SIZES:
        model(image(*other))
    fresh = tiny(dynamic_img_size=True)
    nn.init.zeros_(fresh.pos_embed)
    own = petune.attach(fresh, "convpass", train_head=False, input_size=(3, *size))
    for key, p in own.tuned.items():
        p.copy_(att.tuned[key])
    torch.testing.assert_close(model(image(*size)), fresh(image(*size)))
    torch.testing.assert_close(copy.deepcopy(model)(image(*size)), fresh(image(*size)))


@torch.no_grad()
def test_a_wide_image_is_not_laid_out_as_a_high_one() -> None:
    model = attached().model
    wide = model(image(8, 16))
    high = model(image(8, 16).reshape(2, 3, 8, 16).transpose(2, 3).contiguous())
    assert not torch.allclose(wide, high, atol=1e-4)


def test_saved_at_one_size_it_works_at_another(tmp_path: Path) -> None:
    att = attached()
    att.save(tmp_path)
    fresh = tiny(dynamic_img_size=True)
    nn.init.zeros_(fresh.pos_embed)
    petune.load(fresh, tmp_path)
    assert torch.equal(fresh(image(24, 8)), att.model(image(24, 8)))
    hooks = len(att.model.patch_embed.proj._forward_hooks)
    att.detach()
    assert len(att.model.patch_embed.proj._forward_hooks) == hooks - 1


def test_tokens_that_are_no_grid_are_an_error() -> None:
    model = attached().model
    with pytest.raises(petune.AttachError, match=r"10 tokens.*1 prefix"):
        model.blocks[0](torch.randn(1, 10, 24))


def test_a_repeated_block_of_an_ambiguous_grid_is_an_error() -> None:
    model = attached().model
    model.set_grad_checkpointing()
    model.train()
    for size in ((24, 8), (32, 16)):
        model(image(*size)).sum().backward()  # one shape for each number of patches
    loss = model(image(8, 24)).sum()
    with pytest.raises(petune.AttachError, match="checkpointing"):
        loss.backward()


class Ordered(Encoder):
    """Patches of 4 x 4 pixels, row by row unless `order` says otherwise, or of 4 x 2 by a linear layer."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.cls = order, nn.Parameter(torch.randn(1, 1, D))
        self.embed = nn.Linear(24, D) if order == "not square" else nn.Conv2d(3, D, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        cls = self.cls.expand(len(x), -1, -1)
        if self.order == "not square":
            patches = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 4)).permute(0, 2, 4, 1, 3, 5)
            return self.classify(self.embed(patches.flatten(3).flatten(1, 2)))
        y = self.embed(x).transpose(2, 3) if self.order == "by column" else self.embed(x)
        tokens = y.flatten(2).transpose(1, 2)
        order = {"class token behind": [tokens, cls], "class token first": [cls, tokens]}
        return self.classify(torch.cat(order.get(self.order, [tokens]), 1))


@pytest.mark.parametrize("order", ["class token behind", "by column", "not square"])
@pytest.mark.parametrize("method", ["convpass", "mona"])
def test_tokens_in_another_order_than_the_image_are_refused(method: str, order: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(petune.AttachError, match="order of the image"):
        petune.attach(Ordered(order), method, example=image(12, 16))
    petune.attach(Ordered("class token first"), method, example=image(12, 16))


class Mapped(Encoder):
    """Patches of 4 x 4 pixels in rows and columns, which a linear layer embeds before they become one row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, D)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return self.classify(self.embed(patches).flatten(1, 2))


@pytest.mark.parametrize("method", ["convpass", "mona"])
@torch.no_grad()
def test_a_linear_layer_that_returns_rows_and_columns_makes_a_grid(method: str) -> None:
    torch.manual_seed(0)
    linear, convolution = Mapped(), Ordered("class token first")
    assert petune.find_sites(linear, example=image(12, 16)).grid_size == (3, 4)
    convolution.order = "row by row"
    linear.blocks, linear.head = copy.deepcopy(convolution.blocks), copy.deepcopy(convolution.head)
    linear.embed.weight.copy_(convolution.embed.weight.flatten(1))
    linear.embed.bias.copy_(convolution.embed.bias)
    outputs = []
    for model in (linear, convolution):
        torch.manual_seed(1)
        randomised(petune.attach(model, method, example=image(12, 16), train_head=False))
        outputs.append([model(image(*size)) for size in ((12, 16), (24, 8))])
    torch.testing.assert_close(*outputs)
