"""Attaching works in any context, and detaching leaves no gradients and no foreign wrapper behind or undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from survey.snapshot import differences, snapshot
from torch import Tensor, nn

import petune
from tests.tiny import X, tiny


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "meta"])
def test_what_is_attached_in_any_context_trains(context: Any) -> None:
    model = tiny()
    with context():
        att = petune.attach(model, "adaptformer", bottleneck=2)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    model(X).square().mean().backward()
    att.check_gradients()


@pytest.mark.filterwarnings("ignore:full leaves 1 parameter")
@pytest.mark.parametrize("method", ["vpt", "full"])
def test_detached_after_training_nothing_is_left(method: str) -> None:
    model = tiny()
    model.blocks[0].train()
    model.norm.bias.requires_grad_(False)
    model.norm.weight.grad = torch.zeros(24)
    before = snapshot(model)
    att = petune.attach(model, method)
    model.train()
    model(X).square().mean().backward()
    torch.optim.SGD(att.parameters(), 0.1).step()
    model.eval()
    att.detach()
    after = snapshot(model)
    changed = {line.partition(":")[0] for line in differences(before, after)}
    assert changed <= {"torch random state", "norm._parameters.weight.grad"}


def test_a_forward_that_someone_has_wrapped_stays_wrapped() -> None:
    """accelerate puts its own forward on modules; prompts have put theirs there before."""
    model = tiny()
    expected = model(X)
    att = petune.attach(model, "vpt")
    prompted = model(X)
    block, calls = model.blocks[0], []
    inner = block.forward

    def wrapper(x: Tensor) -> Tensor:
        calls.append(x)
        return inner(x)

    block.forward = wrapper
    with att.disabled():
        assert torch.equal(model(X), expected)
    assert torch.equal(model(X), prompted)
    att.detach()
    assert torch.equal(model(X), expected)
    assert block.forward is wrapper
    assert len(calls) == 3


def test_a_train_that_someone_has_wrapped_stays_wrapped() -> None:
    model = tiny()
    att = petune.attach(model, "linear")
    inner = model.train

    def train(mode: bool = True) -> nn.Module:
        return inner(mode)

    model.train = train
    att.detach()
    assert model.train is train
    assert all(m.training for m in model.train().modules())
