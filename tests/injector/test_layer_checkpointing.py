"""transformers' own gradient checkpointing, whose layers ask for train mode, on models with frozen layers."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.training.speed.grad_checkpointing import checkpoint_blocks
from tests.tiny import X, randomised

transformers = pytest.importorskip("transformers")
KWARGS = {"activation_checkpointing_kwargs": {"use_reentrant": True}}


def vit() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    config = transformers.ViTConfig(image_size=16, patch_size=4, **shape, **dropout)
    return transformers.ViTForImageClassification(config).eval()


def enable(model: Any, **options: Any) -> None:
    """Turn checkpointing on by the name that this version of transformers has."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(**options)
    else:
        model.gradient_checkpointing_enable(options.get("activation_checkpointing_kwargs"))


def step(model: nn.Module) -> tuple[dict[str, Tensor], Counter[bool]]:
    """Return the gradients of a training step, and how often a norm of the last layer was called in each mode."""
    layer: Any = [m for m in model.modules() if type(m).__name__ == "ViTLayer"][-1]
    modes: Counter[bool] = Counter()
    handle = layer.layernorm_before.register_forward_hook(lambda *_: modes.update([layer.training]))
    model.train()
    model.zero_grad()
    torch.manual_seed(1)
    model(X).logits.square().sum().backward()
    handle.remove()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}, modes


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], t) for key, t in expected.items())


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("method", ["adaptformer", "lora", "lst", "vpt", "vpt:deep=false"])
def test_frozen_layers_run_again_and_gradients_are_the_same(method: str, before: bool) -> None:
    expected, modes = step(randomised(petune.attach(vit(), method)).model)
    assert modes == {False: 1}
    model = vit()
    if before:
        enable(model)
    att = randomised(petune.attach(model, method))
    if not before:
        enable(model)
    found, modes = step(model)
    assert same(found, expected)
    assert modes == {False: 1 if method == "lst" else 2}  # its gradients do not reach the backbone
    with att.disabled():
        assert torch.equal(model.eval()(X).logits, vit()(X).logits)
    att.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_that_train_keep_their_dropout() -> None:
    att = petune.attach(vit(), "partial")
    expected, _ = step(att.model)
    enable(att.model)
    found, _ = step(att.model)
    assert same(found, expected)
    assert [block.enter.training for block in att.sites.blocks] == [False, True]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_checkpoints_its_own_layers(duplicate: Any) -> None:
    att = randomised(petune.attach(vit(), "lora"))
    enable(att.model)
    expected, _ = step(att.model)
    att.model.eval()
    found, modes = step(duplicate(att.model))
    assert same(found, expected)
    assert modes == {False: 2}


def test_petunes_own_checkpointing_around_it_changes_nothing() -> None:
    att = randomised(petune.attach(vit(), "lora"))
    expected, _ = step(att.model)
    enable(att.model)
    with checkpoint_blocks(att):
        found, _ = step(att.model)
    assert same(found, expected)


def test_after_an_exception_the_layer_is_as_before() -> None:
    att = petune.attach(vit(), "lora")
    enable(att.model)
    layer = att.sites.blocks[0].enter
    before = dict(layer.__dict__)
    handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(att.model)
    handle.remove()
    assert dict(layer.__dict__) == before


def test_the_reentrant_kind_is_refused() -> None:
    att = petune.attach(vit(), "lora")
    enable(att.model, **KWARGS)
    with pytest.raises(petune.AttachError, match='"use_reentrant": False'):
        step(att.model)
    with torch.no_grad():
        att.model(X)


def test_a_version_whose_call_decides_is_refused() -> None:
    class GradientCheckpointingLayer(nn.Linear):
        gradient_checkpointing = False

    model = vit()
    model.vit.embeddings.dropout = GradientCheckpointingLayer(24, 24)
    petune.attach(model, "lora")
    enable(model)
    with pytest.raises(petune.AttachError, match="grad_checkpointing=true"):
        step(model)
