"""An adapter that no gradient reaches is refused when it is attached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import DeadSite
from tests.tiny import X, tiny

ADAPTERS = ("adaptformer", "houlsby", "lora", "vpt", "ssf")


class Dense(nn.Module):
    """A model with a tiny ViT as a part and a layer of its own; the ViT's blocks are 0 and 1."""

    input_size = (3, 16, 16)

    def __init__(self, features: Callable[[nn.Module, Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.vit = tiny()
        self.vit.head = nn.Identity()
        self.fc = nn.Linear(24, 5)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.features(self.vit, x, self.training))
        return y


def without_gradient(vit: nn.Module, x: Tensor, training: bool) -> Tensor:
    with torch.no_grad():
        return vit(x)


def first_block_only(vit: nn.Module, x: Tensor, training: bool) -> Tensor:
    outputs: list[Tensor] = []
    handle = vit.blocks[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    vit(x)
    handle.remove()
    return outputs[0][:, 0]


def gradient_in_training(vit: nn.Module, x: Tensor, training: bool) -> Tensor:
    with torch.set_grad_enabled(training):
        return vit(x)


def loss_in_training(vit: nn.Module, x: Tensor, training: bool) -> Tensor:
    if training:
        raise ValueError("targets are missing")
    return without_gradient(vit, x, training)


def test_a_part_that_runs_without_gradient_is_refused() -> None:
    for method in (*ADAPTERS, "partial", "full"):
        model = Dense(without_gradient)
        before = {key: (p.requires_grad, p.clone()) for key, p in model.named_parameters()}
        with pytest.raises(DeadSite, match=r"at vit\.blocks\.\d.* of Dense: .*no_grad"):
            petune.attach(model, method, input_size=model.input_size)
        after = dict(model.named_parameters())
        assert before.keys() == after.keys()
        assert all(after[key].requires_grad == flag and torch.equal(after[key], p) for key, (flag, p) in before.items())
    assert petune.attach(Dense(without_gradient), "linear", input_size=Dense.input_size).head


def test_a_block_whose_output_is_not_read_is_refused_by_number() -> None:
    for method in ADAPTERS:
        with pytest.raises(DeadSite, match=r"at vit\.blocks\.1 of Dense: .*blocks=\[0\]"):
            petune.attach(Dense(first_block_only), method, input_size=Dense.input_size)
    with pytest.raises(DeadSite, match=r"blocks=\[0\]"):
        petune.attach(Dense(first_block_only), "partial", input_size=Dense.input_size)
    model = Dense(first_block_only)
    att = petune.attach(model, "adaptformer", blocks=[0], input_size=Dense.input_size)
    att.train()
    model(X).sum().backward()
    att.check_gradients()


@pytest.mark.parametrize("method", ["partial", "lora", "adaptformer"])
def test_other_blocks_of_the_same_model_are_checked_too(method: str) -> None:
    model = Dense(first_block_only)
    sites = petune.find_sites(model, model.input_size)
    petune.attach(model, method, sites=sites.with_blocks([0])).detach()
    with pytest.raises(DeadSite, match=r"vit\.blocks\.1"):
        petune.attach(model, method, sites=sites.with_blocks([1]))


def test_gradients_that_are_on_only_in_training_count() -> None:
    model = Dense(gradient_in_training)
    att = petune.attach(model, "adaptformer", input_size=Dense.input_size)
    att.train()
    model(X).sum().backward()
    att.check_gradients()


def test_a_training_mode_that_cannot_be_tried_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"in eval mode.*check_gradients"):
        petune.attach(Dense(loss_in_training), "adaptformer", input_size=Dense.input_size)


class Counting(nn.Module):
    """Writes its buffers in train mode, also a large one, and draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rng = nn.BatchNorm1d(24), torch.Generator()
        self.register_buffer("queue", torch.zeros(2**20 + 1))
        self.register_buffer("mean", torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.queue.add_(torch.rand(1, generator=self.rng))
            self.mean.data += x.detach().mean(0)
        y: Tensor = self.norm(x)
        return y


def test_a_forward_in_train_mode_changes_no_buffer() -> None:
    for features in (first_block_only, gradient_in_training):  # refused, and attached
        model = Dense(features)
        model.fc = nn.Sequential(Counting(), model.fc)
        model.eval()
        counting = model.fc[0]
        before, state = {key: value.clone() for key, value in model.state_dict().items()}, counting.rng.get_state()
        with contextlib.suppress(DeadSite):
            petune.attach(model, "adaptformer", input_size=Dense.input_size)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
        assert torch.equal(counting.rng.get_state(), state)
        assert not any(module.training for module in counting.modules())


def test_the_forward_that_checks_keeps_nothing() -> None:
    model = tiny()
    with torch.inference_mode():
        att = petune.attach(model, "adaptformer")
    assert all(p.grad is None for p in model.parameters())
    assert not torch.is_inference(next(iter(att.tuned.values())))
