"""Attention and MLP that flatten a map and normalize it themselves, in a wrapper that scales what they return."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.sites.branching_blocks import Attention, D, Square, mlp
from tests.tiny import randomised

IMAGES = torch.randn(2, 3, 16, 16)
FLATTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.flatten(1, 2),
    "reshape and join": lambda x: torch.cat([x.reshape(len(x), -1, D)], 1),  # as pack of einops
    "as it is": lambda x: x,
}


class Normed(nn.Module):
    """A branch for tokens in a row that has its norm inside, and takes and returns a map."""

    def __init__(self, branch: nn.Module, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.branch, self.flatten = nn.LayerNorm(D), branch, flatten

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(self.norm(self.flatten(x)).view(len(x), -1, D)).view(x.shape)


class Scaled(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn, self.scale = fn, nn.Parameter(torch.full((D,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) * self.scale


class Layers(nn.Module):
    """A layer of three branches, one of which mixes neighboring tokens."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.local = nn.Conv2d(D, D, 3, padding=1, groups=D)
        mixing = Normed(nn.Identity(), flatten)
        branches = Normed(Attention(), flatten), mixing, Normed(mlp(), flatten)
        self.layers = nn.ModuleList(Scaled(branch) for branch in branches)

    def forward(self, x: Tensor) -> Tensor:
        attention, local, feed_forward = self.layers
        x = attention(x) + x
        x = self.local(local(x).movedim(-1, 1)).movedim(1, -1) + x
        return feed_forward(x) + x


@pytest.mark.parametrize("name", FLATTEN)
def test_an_adapter_and_a_norm_are_inside_of_a_wrapper_that_scales(name: str) -> None:
    model = Square(lambda: Layers(FLATTEN[name]), -1).eval()
    layers = model.blocks[0].layers
    block = petune.find_sites(model).blocks[0]
    assert (block.norm1.enter, block.norm2.enter) == (layers[0].fn.norm, layers[2].fn.norm)
    seen: list[Tensor] = []
    att = randomised(petune.attach(model, "houlsby:bottleneck=2"))
    for wrapper in (layers[0], layers[2]):
        wrapper.fn.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
        wrapper.register_forward_hook(lambda module, args, y: seen.append(y.detach() / 0.1))
    model(IMAGES)
    with att.disabled():
        model(IMAGES)
    with_adapters, without = seen[:4], seen[4:]
    assert not torch.equal(with_adapters[0], without[0])
    for inside, around in ((with_adapters[0], with_adapters[1]), (with_adapters[2], with_adapters[3])):
        torch.testing.assert_close(inside, around)
