"""Blocks that change their last sum by an operation, not a module: an adapter adds to the sum, not behind that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petune
from tests.sites.any_input import D, Layer
from tests.sites.test_returned import Returns

End = Callable[[Tensor, Tensor], Tensor]


def root_mean_square(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True))


def overwritten(z: Tensor) -> Tensor:
    z.relu_()
    return z


CHANGED: dict[str, tuple[End, Callable[[Tensor], Tensor]]] = {
    "layer_norm": (lambda x, y: F.layer_norm(x + y, (D,)), lambda z: z.mean(-1)),
    "scaled stream": (lambda x, y: F.layer_norm(1.2 * x + y, (D,)), lambda z: z.mean(-1)),
    "scaled sum": (lambda x, y: 2 * F.layer_norm(0.5 * (x + y), (D,)), lambda z: z.mean(-1)),
    "scaled branch": (lambda x, y: F.layer_norm(x + 0.5 * y, (D,)).clone(), lambda z: z.mean(-1)),
    "lerp": (lambda x, y: F.normalize(torch.lerp(x, y, 0.3), dim=-1), lambda z: z.norm(dim=-1) - 1),
    "rsqrt": (lambda x, y: root_mean_square(1.2 * x + y), lambda z: z.square().mean(-1) - 1),
    "activation": (lambda x, y: F.relu(1.2 * x + y), lambda z: z.clamp(max=0)),
    "relu_": (lambda x, y: (x + y).relu_(), lambda z: z.clamp(max=0)),
    "in place": (lambda x, y: F.relu(x + y, inplace=True), lambda z: z.clamp(max=0)),
    "in place, not returned": (lambda x, y: overwritten(x + y), lambda z: z.clamp(max=0)),
    "of flattened tokens": (lambda x, y: F.relu((x + y).flatten(0, 1)).view(x.shape), lambda z: z.clamp(max=0)),
    "divided branch": (lambda x, y: F.layer_norm(x + y / 40, (D,)), lambda z: z.mean(-1)),
}
"""Ends of a block, from stream and MLP's output; and what is zero for what they return."""


class Block(Layer):
    def __init__(self, end: End) -> None:
        super().__init__()
        self.end = end

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return self.end(x, self.mlp(self.norm2(x)))


def model_of(end: End) -> nn.Module:
    torch.manual_seed(0)
    model = Returns(lambda logits, _: logits)
    model.blocks = nn.ModuleList(Block(end) for _ in range(2))
    return model.eval()


@pytest.mark.parametrize("name", CHANGED)
def test_what_an_adapter_adds_is_changed_with_the_sum(name: str) -> None:
    end, deviation = CHANGED[name]
    model, x = model_of(end), torch.randn(2, 3, 8, 8)
    before = model(x)
    variant = "paddle_study" if petune.find_sites(model).blocks[0].scales_mlp else "official"
    att = petune.attach(model, "adaptformer", bottleneck=2, variant=variant)
    for parameter in att.tuned.values():
        nn.init.normal_(parameter)
    returned: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: returned.append(output))
    assert not torch.allclose(model(x), before)
    assert all(deviation(z).abs().max() < 1e-4 for z in returned)
    assert petune.find_sites(model).blocks[0].is_module


def test_blocks_say_which_of_them_scale_what_the_mlp_returns() -> None:
    scaling = [name for name, (end, _) in CHANGED.items() if petune.find_sites(model_of(end)).blocks[0].scales_mlp]
    assert scaling == ["lerp", "divided branch"]


KEPT: dict[str, End] = {
    "reshape": lambda x, y: (x + y).reshape(x.shape),
    "view": lambda x, y: (x + y).view(len(x), -1, D),
    "flatten": lambda x, y: (x + y).flatten(1).unflatten(1, (-1, D)),
    "contiguous": lambda x, y: (x + y).contiguous(),
    "clone": lambda x, y: (x + y).clone(),
}


def test_a_block_that_ends_with_the_same_tokens_joins_no_windows() -> None:
    for name, end in KEPT.items():
        block = petune.find_sites(model_of(end)).blocks[0]
        assert block.is_module, name
        assert {"attn", "mlp", "norm1", "norm2", "mid"} == block.parts.keys(), name
