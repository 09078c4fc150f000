"""An error of an adapter at attach names the adapter, and the author's file and line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.injector.test_edit import Custom
from tests.tiny import tiny


class Raises(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("a mistake")


class WrongSize(Raises):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (5, 16)).flatten(-2) * self.weight


class Lazy(Raises):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.layer = nn.LazyLinear(dim)


def attach(adapter: type[Raises], *, twice: bool = False) -> None:
    def change(edit: petune.Edit) -> None:
        for block in edit.sites.blocks:
            edit.parallel(block.mlp, block.mlp, adapter(block.dim))
            if twice:
                edit.attention(block)  # looks into a forward while the adapter acts

    petune.attach(tiny(), Custom(change), name="mine")


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("adapter", [Raises, WrongSize])
def test_it_names_the_adapter_and_the_line(adapter: Any, twice: bool) -> None:
    line = adapter.forward.__code__.co_firstlineno + 1
    with pytest.raises(petune.AttachError) as caught:
        attach(adapter, twice=twice)
    text = str(caught.value)
    assert f"the adapter {adapter.__name__} raises" in text
    assert f"(test_adapter_errors.py:{line})" in text
    assert "input_size" not in text
    with pytest.raises(petune.AttachError, match=r"test_adapter_errors\.py:\d"):
        petune.check_tuner(Custom(lambda edit: edit.after(edit.sites.blocks[0], adapter(edit.sites.blocks[0].dim))))


def test_a_lazy_layer_is_refused() -> None:
    with pytest.raises(petune.AttachError, match=r"layer\.weight of the adapter Lazy has no shape"):
        attach(Lazy)
