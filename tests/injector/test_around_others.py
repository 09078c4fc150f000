"""An adapter that calls `inner` twice, around a part of what another adapter needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.injector.test_forward_verbs import Cell, Never, Twice, attach
from tests.injector.test_verb_order import Matrix
from tests.tiny import X, tiny


class Both(Matrix):
    """A linear map of two tensors."""

    def forward(self, x: list[Tensor]) -> Tensor:  # type: ignore[override]
        return (x[0] + x[1].tanh()) @ self.weight.T


class Three(Cell):
    """A side network of three sites."""

    def __init__(self) -> None:
        super().__init__(3)


class Tokens(nn.Module):
    """Two prompts that pass through all blocks."""

    num_prompts = 2

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 2, 24, generator=torch.Generator().manual_seed(5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens


Written = Callable[[Any, Tensor, Any], Tensor]


def twice(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: 0.5 * inner(x) + inner(2 * x)


def read_attention(blocks: Any, x: Tensor, adapter: Any) -> Tensor:
    b, y = blocks[1], blocks[0](x)
    read = b.norm1(y)
    y = y + b.attn(read)
    return blocks[2](y + twice(lambda x: b.mlp(x) + adapter(read))(b.norm2(y)))


def read_both(blocks: Any, x: Tensor, adapter: Any) -> Tensor:
    b, y = blocks[1], blocks[0](x)
    first = b.norm1(y)
    y = y + b.attn(first)
    second = b.norm2(y)
    return blocks[2](y + twice(b.mlp)(second) + adapter([first, 2 * second]))  # as the last call has read it


def read_block(blocks: Any, x: Tensor, adapter: Any) -> Tensor:
    b, y = blocks[1], blocks[0](x)

    def block(z: Tensor) -> Tensor:
        z = z + b.attn(b.norm1(z))
        return z + b.mlp(b.norm2(z)) + adapter(x)

    return blocks[2](twice(block)(y))


def side(blocks: Any, x: Tensor, cell: Any) -> Tensor:
    x = blocks[0](x)
    state = cell.maps[0](x)
    states = [state.tanh() + cell.maps[1](y) for y in (blocks[1](x), blocks[1](2 * x))]
    ys = [y + s for y, s in zip((blocks[1](x), blocks[1](2 * x)), states, strict=True)]
    x = blocks[2](0.5 * ys[0] + ys[1])
    return x + states[1].tanh() + cell.maps[2](x)


def prompts(blocks: Any, x: Tensor, adapter: Any) -> Tensor:
    p = adapter.tokens.expand(len(x), -1, -1)
    x, p = _split(blocks[0](_join(x, p)))
    (a, _), (b, p) = _split(blocks[1](_join(x, p))), _split(blocks[1](_join(2 * x, p)))
    return _split(blocks[2](_join(0.5 * a + b, p)))[0]


def _join(x: Tensor, p: Tensor) -> Tensor:
    return torch.cat([x[:, :1], p, x[:, 1:]], 1)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([x[:, :1], x[:, 3:]], 1), x[:, 1:3]


CASES: dict[str, tuple[type[nn.Module], Callable[..., Any], str, Written]] = {
    "reads outside": (Matrix, lambda e, b, a: e.parallel(b[1].attn, b[1].mlp, a), "mlp", read_attention),
    "reads outside and inside": (Both, lambda e, b, a: e.parallel([b[1].attn, b[1].mlp], b[1], a), "mlp", read_both),
    "reads another block": (Matrix, lambda e, b, a: e.parallel(b[0], b[1].mlp, a), "block", read_block),
    "a side network": (Three, lambda e, b, a: e.side(b, a, leaving=True), "block", side),
    "prompts": (Tokens, lambda e, b, a: e.prompt(b, a), "block", prompts),
}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_each_call_of_inner_finds_what_was_kept_before(case: str, later: bool) -> None:
    kind, place, site, written = CASES[case]
    model: Any = tiny(depth=3)
    own, adapter = copy.deepcopy(model), kind()
    verbs = {
        "around": lambda e: e.around(getattr(e.sites.blocks[1], site) if site == "mlp" else e.sites.blocks[1], Twice()),
        "other": lambda e: place(e, e.sites.blocks, adapter),
    }
    for name in sorted(verbs, reverse=later):
        attach(model, verbs[name], name=name)
    expected = own.head(own.norm(written(own.blocks, own._pos_embed(own.patch_embed(X)), adapter))[:, 0])
    torch.testing.assert_close(model(X), expected)
    model(X).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    torch.testing.assert_close(copy.deepcopy(model)(X), expected)


def test_what_is_read_for_a_site_that_is_left_out_does_not_stay() -> None:
    model: Any = tiny()
    attach(model, lambda e: e.parallel(e.sites.blocks[0].attn, e.sites.blocks[0].mlp, Matrix()), name="read")
    attach(model, lambda e: e.around(e.sites.blocks[0].mlp, Never()), name="never")
    model(X)
    kept = [key for m in model.modules() for key, v in vars(m).items() if isinstance(v, Tensor) and v.shape[0] == 2]
    assert not kept, kept


@torch.no_grad()
def test_compiled_with_a_reader_outside() -> None:
    model: Any = tiny()
    attach(model, lambda e: e.parallel(e.sites.blocks[0].attn, e.sites.blocks[0].mlp, Matrix()), name="read")
    attach(model, lambda e: e.around(e.sites.blocks[0].mlp, Twice()), name="twice")
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))


def test_a_reader_of_what_is_left_out_says_so() -> None:
    model: Any = tiny()

    def change(e: petune.Edit) -> None:
        e.parallel(e.sites.blocks[0].mlp, e.sites.blocks[0], Matrix())
        e.around(e.sites.blocks[0].mlp, Never())

    with pytest.raises(petune.AttachError, match="may leave it out"):
        attach(model, change)
