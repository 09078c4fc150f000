"""Methods on a model whose blocks compute their gradients by a function of their own, as reversible layers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.tiny import X, tiny


class Recomputed(torch.autograd.Function):
    """Run layers without a graph, and again in the backward, from a random state that a forward in train mode keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layers, ctx.state = layers, torch.get_rng_state() if layers.training else None
        return layers(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        torch.set_rng_state(ctx.state)
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.layers(x).backward(gradient)
        return x.grad, None


class Blocks(nn.Sequential):
    needs_state = True

    def forward(self, x: Tensor) -> Tensor:
        return Recomputed.apply(x, _Run(self))


class _Run:
    def __init__(self, blocks: Blocks) -> None:
        self.blocks, self.training = blocks, blocks.training or not blocks.needs_state

    def __call__(self, x: Tensor) -> Tensor:
        return nn.Sequential.forward(self.blocks, x)


def model_of(*, needs_state: bool = True) -> nn.Module:
    model = tiny()
    model.blocks = Blocks(*model.blocks)
    model.blocks.needs_state = needs_state
    return model.eval()


def test_a_method_whose_backward_fails_in_eval_mode_is_refused() -> None:
    model = model_of()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(petune.AttachError, match="linear"):
        petune.attach(model, "bitfit")
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("method", "needs_state"), [("linear", True), ("bitfit", False)])
def test_a_method_whose_backward_works_trains(method: str, needs_state: bool) -> None:
    att = petune.attach(model_of(needs_state=needs_state), method)
    att.model.train()
    att.model(X).sum().backward()
    assert all(p.grad is not None for p in att.parameters())


def test_a_method_that_no_gradient_reaches_is_refused_as_such() -> None:
    model = model_of()
    model.norm, model.fc_norm = nn.Identity(), nn.Identity()
    with pytest.raises(petune.DeadSite):
        petune.attach(model, "norm")
