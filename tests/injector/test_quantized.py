"""Backbones with quantized weights, which are tensor subclasses: methods train on them, adapters save and load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import petune
from tests.injector.quantized import ConstantWeight, Float8Weight, Int8Weight, LockedWeight, OpaqueWeight, quantize
from tests.sampling import sampled
from tests.tiny import X, randomised, tiny


class SingleEntries(petune.Tuner[petune.TunerConfig]):
    """Train the first column of the layers that make q, k and v."""

    def attach(self, edit: petune.Edit) -> None:
        for block in edit.sites.blocks:
            weight = block.attn.enter.qkv.weight
            mask = torch.zeros_like(weight, dtype=torch.bool)
            mask[:, 0] = True
            edit.train([weight], mask=[mask])


METHODS = ["adaptformer", "bitfit", "fact", "linear", "lst", "norm", "vpt"]


@pytest.mark.parametrize("method", sampled(METHODS, {"adaptformer", "bitfit", "vpt"}.__contains__))
def test_an_adapter_of_a_quantized_backbone_loads_on_it_and_on_no_other(method: str, tmp_path: Path) -> None:
    att = randomised(petune.attach(quantize(tiny()), method))
    att.save(tmp_path / "out")
    loaded = petune.load(quantize(tiny()), tmp_path / "out")
    assert loaded.fingerprint() == att.fingerprint()
    with torch.no_grad():
        assert torch.equal(loaded.model(X), att.model(X))
    for other in (quantize(tiny(1)), tiny()):
        with pytest.raises(petune.BackboneMismatch):
            petune.load(other, tmp_path / "out")


@pytest.mark.parametrize("part", ["rows", "scale"])
def test_the_fingerprint_follows_every_part_of_a_quantized_weight(part: str) -> None:
    model = quantize(tiny())
    att = petune.attach(model, "adaptformer")
    before = att.fingerprint()
    assert att.fingerprint() == before
    assert petune.attach(copy.deepcopy(quantize(tiny())), "adaptformer").fingerprint() == before
    getattr(model.blocks[1].mlp.fc1.weight, part)[3] += 1
    assert att.fingerprint() != before


@pytest.mark.parametrize("kind", [Int8Weight, Float8Weight])
def test_a_quantized_weight_that_would_train_is_refused_when_attaching(kind: type[Int8Weight]) -> None:
    model = quantize(tiny(), kind, with_head=True)
    keys = model.state_dict().keys()
    for method, key in (("full", "blocks.0.attn.qkv.weight"), ("adaptformer", "head.weight")):
        with pytest.raises(petune.AttachError, match=key):
            petune.attach(model, method)
    assert model.state_dict().keys() == keys
    petune.attach(model, "adaptformer", train_head=False)


class NoZerosLike(Int8Weight):
    """As torchao's tensors, it lacks operations."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.zeros_like.default:
            raise NotImplementedError("no zeros_like")
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("kind", [Int8Weight, NoZerosLike])
def test_a_method_of_single_entries_is_refused_on_quantized_weights(kind: type[Int8Weight]) -> None:
    model = quantize(tiny(), kind)
    with pytest.raises(petune.AttachError, match=r"quantized.*base_precision"):
        petune.attach(model, SingleEntries())
    assert not any("petune" in key for key in model.state_dict())


def test_a_weight_that_does_not_say_what_it_is_made_of_counts_by_its_values() -> None:
    att, same, other = (petune.attach(quantize(tiny(seed), OpaqueWeight), "adaptformer") for seed in (0, 0, 1))
    assert att.fingerprint() == same.fingerprint() != other.fingerprint()


def test_weights_that_cannot_be_read_are_refused_before_training() -> None:
    with pytest.raises(petune.AttachError, match=r"blocks.0.attn.qkv.weight.*LockedWeight"):
        petune.attach(quantize(tiny(), LockedWeight), "adaptformer")


@pytest.mark.parametrize("method", ["fact", "lora", "repadapter", "ssf"])
def test_weights_that_take_no_change_are_not_mergeable(method: str) -> None:
    att = randomised(petune.attach(quantize(tiny(), ConstantWeight), method))
    before = {key: t.clone() for key, t in att.model.state_dict().items()}
    with torch.no_grad():
        logits = att.model(X)
        with pytest.raises(petune.NotMergeable):
            att.merge()
        assert torch.equal(att.model(X), logits)
    assert before.keys() == att.model.state_dict().keys()
    assert att.enabled
    att.detach()
    with torch.no_grad():
        assert torch.equal(att.model(X), quantize(tiny(), ConstantWeight)(X))


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's, about the norms that it tunes itself
def test_weights_that_cannot_be_compared_do_not_keep_norms_from_merging() -> None:
    att = randomised(petune.attach(quantize(tiny(), ConstantWeight), "peft:ln_tuning"))
    with torch.no_grad():
        logits = att.model(X)
        att.merge()
        torch.testing.assert_close(att.model(X), logits)


def test_a_fault_of_a_merge_on_plain_weights_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes differ")

    att = petune.attach(tiny(), "ssf")
    monkeypatch.setattr(att.edit_log.placed[0].holder.adapter, "merge", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        att.merge()


def test_integers_that_would_train_are_refused_when_attaching() -> None:
    model = tiny()
    model.head.steps = nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)
    model.blocks[0].rows = nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)
    model.blocks[0].register_forward_hook(lambda module, args, output: output + module.rows)
    with pytest.raises(petune.AttachError, match=r"head\.steps"):
        petune.attach(model, "linear")
    del model.head.steps
    with pytest.raises(petune.AttachError, match=r"blocks\.0\.rows"):
        petune.attach(model, "full")
    petune.attach(model, "adaptformer").detach()
