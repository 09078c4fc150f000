"""Gradient checkpointing of the reentrant kind, which cuts off what trains inside, and of whole models."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import petune
from tests.injector.test_checkpointed_verbs import Scaled, around_two, side
from tests.injector.test_edit import Custom
from tests.tiny import X, randomised, tiny

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

WITHIN_BLOCKS = ["adaptformer", "houlsby", "lora", "norm", "partial", "vpt", "ssf"]


def around_each(edit: petune.Edit) -> None:
    for block in edit.sites.blocks:
        edit.around(block, Scaled())


VERBS = {
    "around one": Custom(around_each),
    "around all": Custom(lambda edit: edit.around(edit.sites.blocks, Scaled())),
    "around two": Custom(around_two),
    "side": Custom(side),
}


@pytest.fixture
def reentrant() -> Iterator[None]:
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(True)
    yield
    timm.layers.set_reentrant_ckpt(before)


def attached(method: str, model: nn.Module | None = None) -> petune.Attachment:
    model = tiny(depth=3) if model is None else model
    att = randomised(petune.attach(model, VERBS.get(method, method), name="m"))
    att.train()
    return att


def gradients(att: petune.Attachment, output: Tensor) -> dict[str, Tensor]:
    att.model.zero_grad()
    output.square().sum().backward()
    return {key: p.grad.clone() for key, p in att.model.named_parameters() if p.grad is not None}


def run(att: petune.Attachment, x: Tensor = X) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return gradients(att, att.model(x))


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("reentrant")
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("method", [*WITHIN_BLOCKS, *VERBS, "vpt:deep=false", "lst"])
def test_what_trains_behind_frozen_patches_is_refused(method: str, later: bool) -> None:
    att = attached(method)
    if later:
        run(att)
    att.model.set_grad_checkpointing(True)  # type: ignore[operator]
    with pytest.raises(petune.AttachError, match="use_reentrant=False"):
        att.model(X)
    with torch.no_grad():
        att.model(X)
    att.model.set_grad_checkpointing(False)  # type: ignore[operator]
    assert run(att)


@pytest.mark.usefixtures("reentrant")
@pytest.mark.parametrize("method", [*WITHIN_BLOCKS, "around one"])
def test_gradients_are_right_behind_images_that_need_one(method: str) -> None:
    att = attached(method)
    x = X.clone().requires_grad_()
    expected = run(att, x)
    att.model.set_grad_checkpointing(True)  # type: ignore[operator]
    check_same(run(att, x), expected)


@pytest.mark.usefixtures("reentrant")
@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_gradients_are_right_behind_patches_that_train(method: str) -> None:
    att = attached(method)
    expected = run(att)
    att.model.set_grad_checkpointing(True)  # type: ignore[operator]
    check_same(run(att), expected)


@pytest.mark.usefixtures("reentrant")
def test_a_head_alone_trains() -> None:
    att = attached("linear")
    expected = run(att)
    att.model.set_grad_checkpointing(True)  # type: ignore[operator]
    check_same(run(att), expected)


@pytest.mark.usefixtures("reentrant")
@pytest.mark.parametrize("method", ["around all", "around two"])
def test_an_adapter_around_blocks_that_are_repeated_one_by_one_is_refused(method: str) -> None:
    att = attached(method)
    att.model.set_grad_checkpointing(True)  # type: ignore[operator]
    with pytest.raises(petune.AttachError, match="use_reentrant=False"):
        run(att, X.clone().requires_grad_())


@pytest.mark.parametrize("method", [*WITHIN_BLOCKS, *VERBS, "lst"])
def test_a_whole_model_is_repeated(method: str) -> None:
    att = attached(method)
    expected = run(att)
    torch.manual_seed(0)
    check_same(gradients(att, checkpoint(att.model, X, use_reentrant=False)), expected)
    check_same(run(att), expected)


def test_no_block_passes_on_after_a_backward() -> None:
    att = attached("around all")
    att.model.set_grad_checkpointing(True)  # type: ignore[operator]
    run(att)
    x = torch.randn(1, 17, 24)
    assert not any(torch.equal(block.enter(x), x) for block in att.sites.blocks[1:])


class SelfCheckpointing(nn.Module):
    """A block that checkpoints what it computes, as those of mmcv do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.is_on = False

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block.forward, x, use_reentrant=True) if self.is_on else self.block(x)
        return out


@pytest.mark.parametrize("method", ["adaptformer", "lora", "norm"])
def test_blocks_that_checkpoint_themselves(method: str) -> None:
    model = tiny()
    blocks = [SelfCheckpointing(block) for block in model.blocks]  # type: ignore[union-attr]
    model.blocks = nn.Sequential(*blocks)
    att = attached(method, model)
    for block in blocks:
        block.is_on = True
    with pytest.raises(petune.AttachError, match="use_reentrant=False"):
        att.model(X)


@pytest.mark.usefixtures("reentrant")
def test_a_copy_checks_itself_and_no_hook_stays() -> None:
    att = attached("lora")
    before = [len(m._forward_pre_hooks) for m in att.model.modules()]
    twin = copy.deepcopy(att.model)
    twin.set_grad_checkpointing(True)
    with pytest.raises(petune.AttachError, match="use_reentrant=False"):
        twin(X)
    run(att)
    assert [len(m._forward_pre_hooks) for m in att.model.modules()] == before
    att.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in att.model.modules())
