"""Looking at a model leaves no trace: its attributes and hooks, and what it later returns, are those of a fresh one."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import petune
from petune.runner.provenance import forward_flops
from petune.sites.input_spec import InputSpec
from petune.sites.recorder import record
from petune.sites.undisturbed import undisturbed

SMALL = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
COLUMN = {**SMALL, "image_size": 64, "patch_size": 16}


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**COLUMN, output_hidden_states=True))


def dpt() -> nn.Module:
    neck = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16}
    return transformers.DPTForSemanticSegmentation(transformers.DPTConfig(**COLUMN, **neck))


def segformer() -> nn.Module:
    stages = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16}
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(image_size=64, **stages))


def look(model: nn.Module) -> None:
    petune.find_sites(model)


def attach_and_detach(model: nn.Module) -> None:
    petune.attach(model, "bitfit").detach()


def count_flops(model: nn.Module) -> None:
    forward_flops(model, InputSpec.of_size((3, 64, 64)))


@pytest.mark.parametrize("build", [vit, dpt, segformer])
@pytest.mark.parametrize("use", [look, count_flops])
def test_a_fresh_transformers_model_returns_what_it_would_have(
    build: Callable[[], nn.Module], use: Callable[[nn.Module], None]
) -> None:
    check(build().eval(), use)


@pytest.mark.parametrize("build", [vit])
def test_detached_it_returns_what_it_would_have(build: Callable[[], nn.Module]) -> None:
    check(build().eval(), attach_and_detach)


def check(model: nn.Module, use: Callable[[nn.Module], None]) -> None:
    used = copy.deepcopy(model)
    use(used)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, output = model(x, output_hidden_states=True), used(x, output_hidden_states=True)
    assert len(output.hidden_states) == len(expected.hidden_states)
    assert all(map(torch.equal, output.hidden_states, expected.hidden_states))
    assert torch.equal(output.logits, expected.logits)


class Hoarder(nn.Module):
    """A layer that changes itself in its forward, in every way that a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.cache: dict[str, Tensor] = {}
        self.shapes: list[torch.Size] = []
        self.devices: set[str] = set()
        self.count = 0
        self.register_buffer("scale", torch.ones(1))
        self.nested: dict[str, tuple[deque[int], dict[str, Tensor]]] = {"level": (deque(), {})}
        self.own = SimpleNamespace(calls=0)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.nested["level"][0].append(self.count)
        self.nested["level"][1]["x"] = x
        self.own.calls += 1
        self.steps += 1
        self.last = x
        self.cache[x.device.type] = x
        self.shapes.append(x.shape)
        self.devices.add(x.device.type)
        self.register_buffer("scale", torch.ones(1, device=x.device))
        if not self.inner._forward_hooks:
            self.inner.register_forward_hook(lambda module, args, output: output + self.count)
        return self.inner(x)


def hoarding() -> nn.Module:
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **options)
    model.norm = nn.Sequential(model.norm, Hoarder())
    return model


@pytest.mark.parametrize("use", [look, attach_and_detach])
def test_what_a_forward_stores_on_modules_is_undone(use: Callable[[nn.Module], None]) -> None:
    model = hoarding()
    hoarder = model.norm[1]
    own = hoarder.scale
    use(model)
    assert (hoarder.nested, hoarder.own.calls, hoarder.steps.item()) == ({"level": (deque(), {})}, 0, 0)
    assert (hoarder.count, hoarder.cache, hoarder.shapes, hoarder.devices) == (0, {}, [], set())
    assert hoarder.scale is own
    assert not hasattr(hoarder, "last")
    assert not hoarder.inner._forward_hooks


def test_random_states_are_kept() -> None:
    model = nn.Linear(2, 2)
    model.register_forward_pre_hook(lambda module, args: (random.random(), np.random.rand(), torch.rand(1), None)[-1])
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    forward_flops(model, InputSpec.of_size((2, 2, 2)))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_what_the_model_had_before_is_kept() -> None:
    model = hoarding()
    model(torch.randn(1, 3, 16, 16))
    hoarder = model.norm[1]
    last, hooks = hoarder.last, dict(hoarder.inner._forward_hooks)
    petune.find_sites(model)
    assert hoarder.last is last
    assert hoarder.cache == {"cpu": last}
    assert hoarder.inner._forward_hooks == hooks


def test_a_hook_can_still_be_removed_by_its_handle() -> None:
    layer = nn.Linear(2, 2)
    handle = layer.register_forward_hook(lambda module, args, output: output + 1)
    with undisturbed(layer):
        layer.register_forward_hook(lambda module, args, output: output + 1)
    assert list(layer._forward_hooks) == [handle.id]
    handle.remove()
    assert not layer._forward_hooks


def test_attributes_of_tensors_are_kept() -> None:
    """bitsandbytes moves the scales of a quantized weight from the weight to its layer in the first forward."""
    layer = nn.Linear(2, 2)
    layer.weight.scale = torch.ones(2)
    with undisturbed(layer):
        del layer.weight.scale
        layer.bias.used = True
    assert torch.equal(layer.weight.scale, torch.ones(2))
    assert not hasattr(layer.bias, "used")


def test_a_failed_attempt_on_the_meta_device_is_undone_before_the_next() -> None:
    """The model reads a value, so the second forward is a real one: it must not see what the first has stored."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.stored: list[str] = []

        def forward(self, x: Tensor) -> Tensor:
            assert not self.stored
            self.stored.append(x.device.type)
            return self.layer(x.flatten(1)) * float(x.sum() + 1)

    model = Reads()
    trace = record(model, InputSpec.of_size((1, 2, 2)))
    assert trace.root.output is not None
    assert trace.root.output.device.type == "cpu"
    assert model.stored == []
