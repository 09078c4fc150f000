"""A layer that two blocks share gets one adapter, which acts in both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.tuners.peft_bridge.options import peft_types
from tests.tiny import X, randomised, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of much
METHODS = [*sorted(f"peft:{kind}" for kind in peft_types()), "dora", "lora", "fact", "ssf"]
SAMPLE = {"lora", "dora", "peft:ia3", "peft:oft", "peft:vera", "fact", "ssf"}
CASES = [pytest.param(method, marks=[] if method in SAMPLE else pytest.mark.exhaustive) for method in METHODS]
SMALL = {"peft:psoft": {"r": 8}, "peft:fourierft": {"n_frequency": 100}}


def shared(path: str = "mlp.fc1") -> nn.Module:
    """A model whose blocks have one module at `path`."""
    model = tiny()
    model.blocks[1].set_submodule(path, model.blocks[0].get_submodule(path))
    return model


def moved(att: petune.Attachment) -> petune.Attachment:
    """The attachment with values away from their start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in att.tuned.values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return att


def outputs(model: nn.Module, path: str) -> list[Tensor]:
    """What the module at `path` of each block returns for one input."""
    x = torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [block.get_submodule(path)(x) for block in model.blocks]


def is_norm(method: str) -> bool:
    return method == "peft:ln_tuning"


@pytest.mark.parametrize("method", CASES)
def test_one_adapter_acts_in_both_places(method: str, tmp_path: Path) -> None:
    path = "norm1" if is_norm(method) else "mlp.fc1"
    model = shared(path)
    plain, logits = outputs(model, path), model(X)
    att = moved(petune.attach(model, method, train_head=False, **SMALL.get(method, {})))
    first, second = outputs(model, path)
    assert torch.equal(first, second)
    assert not torch.allclose(first, plain[0], atol=1e-4)
    with att.disabled():
        assert torch.equal(model(X), logits)
    att.save(tmp_path)
    again = shared(path)
    petune.load(again, tmp_path)
    assert torch.equal(again(X), model(X))
    att.detach()
    assert model.blocks[0].get_submodule(path) is model.blocks[1].get_submodule(path)
    assert torch.equal(model(X), logits)


@pytest.mark.parametrize("method", ["lora", "peft:vera", "peft:ln_tuning"])
def test_two_attachments_at_a_shared_layer_come_off_one_by_one(method: str) -> None:
    path = "norm1" if is_norm(method) else "mlp.fc1"
    model = shared(path)
    logits = model(X)
    first = moved(petune.attach(model, method, name="first", train_head=False))
    first.disable()
    second = moved(petune.attach(model, method, name="second", train_head=False))
    for detach in (first.detach, second.detach):
        one, other = outputs(model, path)
        assert torch.equal(one, other)
        detach()
    assert model.blocks[0].get_submodule(path) is model.blocks[1].get_submodule(path)
    assert torch.equal(model(X), logits)


def test_lora_merges_into_a_shared_layer() -> None:
    model = shared()
    att = randomised(petune.attach(model, "lora", train_head=False))
    expected = model(X)
    att.merge()
    assert model.blocks[0].mlp.fc1 is model.blocks[1].mlp.fc1
    torch.testing.assert_close(model(X), expected, atol=1e-4, rtol=1e-4)


def test_a_warning_names_the_shared_layer() -> None:
    with pytest.warns(UserWarning, match=r"blocks\.0\.mlp\.fc1 in several places.*petune\.load"):
        petune.attach(shared(), "lora")


def test_ia3_scales_what_enters_a_shared_last_layer_of_the_mlps() -> None:
    model = shared("mlp.fc2")
    att = petune.attach(model, "peft:ia3")
    feedforward = att.tuner.wrapped.config.feedforward_modules
    assert set(feedforward) == {"blocks.0.mlp.fc2"}


@pytest.mark.parametrize("method", ["lora", "fact", "ssf"])
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_shared_attention_or_mlp_gets_one_adapter_at_each_of_its_layers(part: str, method: str) -> None:
    num_tuned = len(petune.attach(tiny(), method).tuned)
    att = randomised(petune.attach(shared(part), method))
    shared_factors = (".u", ".v")  # FacT's; they are registered at its first layer
    inside = [key for key in att.tuned if f".{part}." in key and not key.endswith(shared_factors)]
    assert inside
    assert all(key.startswith("blocks.0.") for key in inside)
    assert len(att.tuned) == num_tuned - len(inside)
    first, second = outputs(att.model, f"{part}.{'proj' if part == 'attn' else 'fc1'}")
    assert torch.equal(first, second)


@pytest.mark.parametrize(("part", "method"), [("mlp", "houlsby"), ("attn", "repadapter"), ("norm1", "ssf")])
def test_adapters_of_two_blocks_at_one_shared_module_are_refused(part: str, method: str) -> None:
    model = shared(part)
    logits = model(X)
    with pytest.raises(petune.AttachError, match=rf"share blocks\.0\.{part}"):
        petune.attach(model, method)
    assert torch.equal(model(X), logits)
    assert list(model.state_dict()) == list(shared(part).state_dict())
