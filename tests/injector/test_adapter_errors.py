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


class Wide(Raises):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], -1) * self.weight.repeat(2)


class Pair(Raises):
    def forward(self, x: Tensor) -> Any:
        return x * self.weight, x


class Plain(Raises):
    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        del self.weight
        self.weights = [torch.ones(dim, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights[0]


class Sized(Raises):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class Tokens(Raises):
    num_prompts = 2

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(1, 2, -1)


def twice_at_q(edit: petune.Edit, block: petune.Block) -> None:
    edit.after(require(edit.attention(block).q), Sized(24))
    edit.after(require(edit.attention(block).q), Sized(72))
    edit.attention(block)


def require(site: petune.Site | None) -> petune.Site:
    assert site is not None
    return site


MISTAKES: dict[str, tuple[Any, str]] = {
    "too wide": (lambda e, b: e.after(b.mlp, Wide(24)), r"adapter Wide \(test_adapter_errors.py:\d+\) .* 24 channels"),
    "a wide change": (lambda e, b: e.parallel(b.mlp, b.mlp, Wide(24)), r"adapter Wide \(test_adapter_errors.py:\d+\)"),
    "a pair": (lambda e, b: e.after(b.mlp, Pair(24)), r"adapter Pair \(test_adapter_errors.py:\d+\) returned a tuple"),
    "called with inner": (
        lambda e, b: e.around(b, Sized(24)),
        r"adapter Sized raises .*\(test_adapter_errors.py:\d+\)",
    ),
    "no parameters": (
        lambda e, b: e.after(b.mlp, Plain(24)),
        r"Plain \(test_adapter_errors.py:\d\d+\) has no param",
    ),
    "a class": (lambda e, b: e.after(b.mlp, Sized), "an adapter is an nn.Module that was built"),
    "a function": (lambda e, b: e.after(b.mlp, torch.relu), "an adapter is an nn.Module that was built"),
    "a path": (lambda e, b: e.train("blocks.0"), "train takes a module.*'blocks.0'"),
    "sites": (lambda e, b: e.train([b.mlp]), "train takes a module"),
    "two widths at q": (twice_at_q, r"adapter Sized raises .*\(test_adapter_errors.py:\d+\)"),
    "prompts twice": (lambda e, b: [e.prompt(b, Tokens(24)) for _ in "ab"], "has prompts of this method already"),
    "by hand": (lambda e, b: setattr(b.mlp.module, "extra", Sized(24)), "edit.add_parameters"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name: str) -> None:
    change, message = MISTAKES[name]

    def attach(edit: petune.Edit) -> None:
        for block in edit.sites.blocks:
            change(edit, block)

    with pytest.raises(petune.AttachError, match=message):
        petune.check_tuner(Custom(attach))


class Writes(Raises):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(x * self.weight)


class Keeps(Raises):
    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = x + (x if self.last is None else self.last[:1]) * self.weight
        self.last = y
        return y


@pytest.mark.parametrize(
    ("adapter", "message"),
    [(Writes, r"Writes \(test_adapter_errors.py:\d+\) changes its input"), (Keeps, "adapter.last keeps a tensor")],
)
def test_what_the_backward_fails_of_is_named(adapter: type[Raises], message: str) -> None:
    def attach(edit: petune.Edit) -> None:
        edit.after(edit.sites.blocks[0].mlp, adapter(24))

    with pytest.raises(petune.ContractViolation, match=message):
        petune.check_tuner(Custom(attach))
