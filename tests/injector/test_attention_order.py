"""Further keys and values, side networks, prompts and others at one attention: the order in which they act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.plugin_dev.tiny_models import tiny_timm, tiny_torchvision
from tests.injector.test_edit import Custom
from tests.tiny import X

Log = list[tuple[str, int]]


class Told(nn.Module):
    """Notes that it was called, and with how many tokens."""

    num_prompts = 2

    def __init__(self, name: str, log: Log) -> None:
        super().__init__()
        self.name, self.log = name, [log]
        self.scale = nn.Parameter(torch.ones(()))
        self.tokens = nn.Parameter(torch.ones(1, 3, 24))

    def forward(self, *args: Any) -> Any:
        x = args[1] if self.name in {"around", "side"} else args[0]
        self.log[0].append((self.name, (x[0] if isinstance(x, list) else x).shape[-2]))
        return getattr(self, self.name)(*args)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.tokens, self.tokens

    def prompt(self, x: Tensor) -> Tensor:
        return self.tokens[:, :2]

    def around(self, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return inner(x) * self.scale

    def side(self, state: Tensor | None, x: Any, index: int) -> tuple[Tensor, Tensor | None]:
        if index == 1:
            return x, (self.scale * state)[:, :3]
        return x[0].mean((1, 2)), None

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale

    before = after = parallel = scaled


def attached(order: str, build: Callable[[], nn.Module]) -> Log:
    """Put the verbs at the first attention, in this order, and return what a forward tells."""
    log: Log = []

    def change(edit: petune.Edit) -> None:
        block = edit.sites.blocks[0]
        for verb in order.split():
            adapter = Told(verb, log)
            if verb == "side":
                edit.side([edit.attention(block), edit.sites.head], adapter)
            elif verb in {"keys_values", "prompt"}:
                getattr(edit, verb)(block, adapter)
            elif verb == "parallel":
                edit.parallel(block.attn, block.attn, adapter)
            else:
                getattr(edit, verb)(block.attn, adapter)

    model = build()
    petune.attach(model, Custom(change), train_head=False)
    log.clear()
    model(X)
    return log[:-1] if "side" in order else log  # the last one is the side network at the classifier


ORDERS = {
    "keys_values side": [("keys_values", 17), ("side", 20)],
    "side keys_values": [("keys_values", 17), ("side", 17)],
    "side prompt around": [("prompt", 17), ("around", 19), ("side", 19)],
    "after side before keys_values": [("before", 17), ("keys_values", 17), ("after", 17), ("side", 17)],
    "keys_values side parallel prompt around": [
        ("prompt", 17), ("around", 19), ("keys_values", 19), ("side", 22), ("parallel", 19),
    ],
    "around parallel prompt side keys_values": [
        ("prompt", 17), ("around", 19), ("keys_values", 19), ("parallel", 19), ("side", 19),
    ],
}  # fmt: skip


@pytest.mark.parametrize("build", [tiny_timm, tiny_torchvision])
@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_the_order_at_one_attention(order: str, build: Callable[[], nn.Module]) -> None:
    assert attached(order, build) == ORDERS[order]


def test_a_second_adapter_of_keys_and_values_is_refused() -> None:
    with pytest.raises(petune.AttachError, match="another adapter"):
        attached("keys_values keys_values", tiny_timm)
