"""Models that return objects of their own classes, or one number: what is in these is found like logits in a tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.sites.logits import logits_of
from tests.sites.any_input import D, Encoder, Layer


class Prediction:
    """An output that refers to its model and to itself, as one with a `decode` method may."""

    def __init__(self, logits: Tensor, model: nn.Module) -> None:
        self.model, self.itself, self.logits = model, self, logits


class Slotted:
    __slots__ = ("logits", "unset")

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class Holder:
    def __init__(self, *content: Any) -> None:
        self.content = content


def nested(logits: Tensor, model: nn.Module) -> Holder:
    return Holder({"first": [Prediction(logits, model)]})


class Returns(Encoder):
    """Take (B, 3, 8, 8); `wrap` makes the output of logits (B, 3) and the model."""

    def __init__(self, wrap: Callable[[Tensor, nn.Module], Any]) -> None:
        super().__init__()
        self.image_size, self.wrap, self.embed = 8, wrap, nn.Conv2d(3, D, 4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.classify(self.embed(x).flatten(2).transpose(1, 2)), self)


OUTPUTS: dict[str, Callable[[Tensor, nn.Module], Any]] = {
    "object": Prediction,
    "slots": lambda logits, _: Slotted(logits),
    "nested": nested,
    "a number": lambda logits, _: logits.square().mean(),
    "dict of a number": lambda logits, _: {"loss": logits.square().mean()},
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_a_model_returns_is_seen_wherever_it_is(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Returns(OUTPUTS[name])
    fresh, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    att = petune.attach(model, "adaptformer", bottleneck=2)
    assert (att.sites.head.path, len(att.sites.blocks)) == ("head", 2)
    logits_of(model(x)).square().sum().backward()
    att.check_gradients()
    torch.nn.init.ones_(next(reversed(att.tuned.values())).data)
    att.save(tmp_path)
    petune.load(fresh, tmp_path)
    assert torch.equal(logits_of(fresh.eval()(x)), logits_of(model.eval()(x)))


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "squeeze": lambda y: y.squeeze(-1),
    "index": lambda y: y[:, 0],
    "flatten": lambda y: y.flatten(),
    "sigmoid": lambda y: y.sigmoid().squeeze(1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_one_number_for_each_image_is_made_by_the_head(name: str) -> None:
    model = Returns(lambda logits, _: NUMBERS[name](logits))
    model.head = nn.Linear(D, 1)
    x = torch.randn(2, 3, 8, 8)
    att = petune.attach(model, "linear", example=x)
    assert list(att.head) == ["head.weight", "head.bias"]
    model(x).sum().backward()
    att.check_gradients()


class Tokens(NamedTuple):
    tokens: Tensor
    weights: Tensor | None


class NamedLayer(Layer):
    def forward(self, x: Tensor) -> Tokens:  # type: ignore[override]
        return Tokens(super().forward(x), None)


class NamedBlocks(Returns):
    """Blocks return a NamedTuple, and the next one reads its first item by name."""

    def __init__(self) -> None:
        super().__init__(lambda logits, _: logits)
        self.blocks = nn.ModuleList(NamedLayer() for _ in range(2))

    def classify(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tokens
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("method", ["adaptformer", "vpt"])
def test_a_block_that_returns_a_named_tuple_still_does(method: str) -> None:
    torch.manual_seed(0)
    model, x = NamedBlocks().eval(), torch.randn(2, 3, 8, 8)
    before = model(x)
    att = petune.attach(model, method)
    for parameter in att.tuned.values():
        nn.init.normal_(parameter)
    assert not torch.allclose(model(x), before)
    att.detach()
    assert torch.equal(model(x), before)


class Lazy(Returns):
    def __init__(self) -> None:
        super().__init__(lambda logits, _: logits)
        self.head = nn.LazyLinear(3)


def test_layers_without_shapes_are_refused_until_a_forward_has_made_them() -> None:
    for look in (petune.find_sites, lambda model: petune.attach(model, "linear")):
        model = Lazy()
        with pytest.raises(petune.AttachError, match=r"head\.weight \(LazyLinear\).* Call the model once"):
            look(model)
        model(torch.zeros(1, 3, 8, 8))
        look(model)


@pytest.mark.parametrize("example", [torch.zeros(0, 3, 8, 8), {"x": torch.zeros(0, 3, 8, 8)}])
def test_an_example_without_samples_is_refused(example: Any) -> None:
    with pytest.raises(petune.AttachError, match=r"holds no sample.*0x3x8x8"):
        petune.find_sites(Returns(lambda logits, _: logits), example=example)
