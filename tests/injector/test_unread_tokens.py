"""Layers that compute only tokens that nothing reads are named: their gradients are zero, though the graph has them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petune
from tests.injector.test_edit import Custom

D = 24


class Block(nn.Module):
    """A pre-norm block whose class token and patches have projections, or MLPs, of their own; or experts."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q_class, self.q_patch = nn.Linear(D, D), nn.Linear(D, D)
        self.kv, self.proj = nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(2 if kind == "experts" else 0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q = (
            self.q_class(y)
            if self.kind != "queries"
            else torch.cat([self.q_class(y[:, :1]), self.q_patch(y[:, 1:])], 1)
        )
        k, v = self.kv(y).chunk(2, -1)
        heads = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        x = x + self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        if self.kind == "experts":  # the first takes the class token and some patches here, elsewhere it may not
            y = torch.cat([self.experts[0](y[:, :9]), self.experts[1](y[:, 9:])], 1)
        return x + self.mlp(y)


class Net(nn.Module):
    image_size = 16

    def __init__(self, kind: str = "queries", pool: str = "class") -> None:
        super().__init__()
        self.pool = pool
        self.stem, self.token = nn.Conv2d(3, D, 4, 4), nn.Parameter(torch.randn(1, 1, D))
        self.blocks = nn.ModuleList(Block(kind) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 5)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.cat([self.token.expand(len(image), -1, -1), self.stem(image).flatten(2).mT], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.pool == "in training" and self.training:
            return self.head(x[:, 0]), self.head(x[:, 1:])
        return self.head(x.mean(1) if self.pool == "mean" else x[:, 0])  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("method", ["lora", "partial"])
@pytest.mark.parametrize("zero_head", [False, True])
def test_queries_of_patches_that_nothing_reads_are_named(method: str, zero_head: bool) -> None:
    model = Net().eval()
    if zero_head:
        nn.init.zeros_(model.head.weight)
    weights = {key: t.clone() for key, t in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=rf"{method} also trains blocks\.1\.q_patch of Net, and learns nothing"):
        att = petune.attach(model, method)
    assert torch.equal(torch.get_rng_state(), state) or method == "lora"  # which draws its start
    assert all(p.grad is None for p in model.parameters())
    att.detach()
    assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())


def test_tokens_that_are_read_somewhere_are_no_reason() -> None:
    for model in (Net(pool="mean"), Net(pool="in training"), Net("experts")):
        petune.attach(model.eval(), "partial")
    petune.attach(Net().eval(), "lora:blocks=first:1")  # the attention of the next block reads its patches


def test_a_branch_that_starts_at_zero_is_no_reason() -> None:
    model = Net(pool="mean").eval()
    for block in model.blocks:
        nn.init.zeros_(block.proj.weight)
        nn.init.zeros_(block.proj.bias)
    petune.attach(model, "lora")


def test_a_block_that_is_shared_keeps_its_parameters() -> None:
    model = Net().eval()
    model.blocks[1] = model.blocks[0]
    before = {key: (id(p), p.clone()) for key, p in model.named_parameters(remove_duplicate=False)}
    petune.attach(model, "partial")  # its projection reads all tokens in the first call
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(id(after[key]) == identity and torch.equal(after[key], p) for key, (identity, p) in before.items())


def test_an_adapter_whose_hidden_units_are_off_is_not_named() -> None:
    """Its second layer gets a gradient, so what it computes is read."""

    def attach(edit: petune.Edit) -> None:
        for block in edit.sites.blocks:
            adapter = nn.Sequential(nn.Linear(D, 2), nn.ReLU(), nn.Linear(2, D))
            nn.init.constant_(adapter[0].bias, -100)
            nn.init.zeros_(adapter[2].weight)
            nn.init.zeros_(adapter[2].bias)
            edit.parallel(block.mlp, block.mlp, adapter)

    petune.attach(Net(pool="mean").eval(), Custom(attach))
