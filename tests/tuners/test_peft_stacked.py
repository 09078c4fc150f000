"""Several of PEFT's types on one model: at one layer, at different layers, saved and removed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import petune
from petune.base.errors import AttachError
from petune.tuners.peft_bridge.options import peft_types
from tests.peft_models import X, logits, model, randomized
from tests.sampling import sampled

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and its dependencies warn of much

TYPES = sorted(peft_types())


@pytest.mark.parametrize("kind", ["lora", "ia3", "oft", "adalora"])
def test_two_of_a_type_both_take_effect_and_can_be_detached(kind: str) -> None:
    def attached(*names: str) -> list[petune.Attachment]:
        built, made = model(), []
        for name in names:
            torch.manual_seed(4)
            made.append(randomized(petune.attach(built, f"peft:{kind}", name=name, train_head=False)))
        return made

    first, second = attached("one", "two")
    both = logits(first.model)
    with second.disabled():
        assert torch.equal(logits(first.model), logits(attached("one")[0].model))
    with first.disabled():
        alone = logits(first.model)
        assert not torch.allclose(alone, both)
        with second.disabled():
            assert torch.equal(logits(first.model), logits(model()))
    assert torch.equal(logits(first.model), both)
    first.model.train()(X).sum().backward()
    first.check_gradients()
    second.check_gradients()
    first.detach()
    assert torch.equal(logits(second.model), alone)


KINDS = ["lora", "ia3", "oft", "boft", "hra", "adalora"]


NOT_SECOND = {"adalora"}  # PEFT only puts it on a model without other adapters


PAIRS = [(a, b) for a, b in itertools.permutations(KINDS, 2) if b not in NOT_SECOND]


@pytest.mark.parametrize(
    ("first", "second"),
    sampled(PAIRS, lambda pair: pair[0] == "lora" or pair in {("boft", "hra"), ("hra", "lora")}),
    ids=map("+".join, PAIRS),
)
def test_different_types_at_one_layer_take_turns(first: str, second: str) -> None:
    built = model()
    plain = logits(built)
    one = randomized(petune.attach(built, f"peft:{first}", train_head=False))
    if first != "hra":  # it reads the weights itself, so for others the layer is never called
        with pytest.raises(AttachError, match="Attach one PEFT type at a time"):
            petune.attach(built, f"peft:{second}", train_head=False)
    alone, held = logits(built), {key: t.clone() for key, t in one.file_state().items()}
    assert not torch.equal(alone, plain)
    one.disable()
    two = randomized(petune.attach(built, f"peft:{second}", train_head=False))
    turned = logits(built)
    assert two.file_state().keys() == petune.attach(model(), f"peft:{second}", train_head=False).file_state().keys()
    with pytest.raises(AttachError, match="active adapter of another PEFT type"):
        one.enable()
    assert torch.equal(logits(built), turned)
    two.disable()
    one.enable()
    assert torch.equal(logits(built), alone)
    again = one.file_state()
    assert again.keys() == held.keys()
    assert all(torch.equal(again[key], t) for key, t in held.items())
    two.detach()
    assert torch.equal(logits(built), alone)
    one.detach()
    assert torch.equal(logits(built), plain)


def test_different_types_at_different_layers_are_saved_apart(tmp_path: Path) -> None:
    built = model()
    atts = [randomized(petune.attach(built, f"peft:{kind}", name=kind)) for kind in ("lora", "ln_tuning")]
    for att in atts:
        att.save(tmp_path / att.name)
    fresh = model()
    first, second = [petune.load(fresh, tmp_path / att.name, name=att.name) for att in atts]
    assert torch.equal(logits(fresh), logits(built))
    assert not [key for key in first.file_state() if "ln_tuning" in key]
    assert not [key for key in second.file_state() if "lora_" in key]


def test_a_disabled_adapter_stays_disabled_when_another_is_detached() -> None:
    built = model()
    plain = logits(built)
    first = randomized(petune.attach(built, "lora", name="a", train_head=False))
    alone = logits(built)
    first.disable()
    petune.attach(built, "lora", name="b", train_head=False).detach()
    assert torch.equal(logits(built), plain)
    first.enable()
    assert torch.equal(logits(built), alone)
    for targets in (["head"], ["qkv", "head"]):  # PEFT has already disabled the first adapter
        with pytest.raises(AttachError, match=r"target_modules includes .*head"):
            petune.attach(built, "lora", name="b", target_modules=targets)
        assert torch.equal(logits(built), alone)


@pytest.mark.parametrize("kind", sampled(["adalora", "adamss", "boft", "delora", "lora", "osf"], "lora".__eq__))
def test_two_of_a_type_are_saved_apart(kind: str, tmp_path: Path) -> None:
    """Adapters of one type share the dictionaries in which PEFT holds a layer's buffers."""
    built = model()
    first = randomized(petune.attach(built, f"peft:{kind}", name="a", train_head=False))
    alone = logits(built)
    second = randomized(petune.attach(built, f"peft:{kind}", name="b", train_head=False))
    first.save(tmp_path / "a")
    first.disable()
    other = logits(built)
    second.save(tmp_path / "b")
    first.detach()
    assert torch.equal(logits(built), other)
    second.save(tmp_path / "later")
    for name, wanted in (("a", alone), ("b", other), ("later", other)):
        fresh = model()
        petune.load(fresh, tmp_path / name)
        assert torch.equal(logits(fresh), wanted), name


@pytest.mark.parametrize("last_first", [False, True])
def test_after_both_are_detached_no_attribute_is_left(last_first: bool) -> None:
    backbone = model()
    before = {*vars(backbone)}
    attachments = [petune.attach(backbone, "lora", name=name, targets=[target]) for name, target in ("aq", "bv")]
    for att in attachments[::-1] if last_first else attachments:
        att.detach()
    assert {*vars(backbone)} == before
