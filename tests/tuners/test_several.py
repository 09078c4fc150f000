"""Several attachments on one model: stacked, enabled and removed in any order."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import petune
from petune.base.errors import AttachError, BackboneMismatch
from petune.injector.registry import build_tuner
from petune.plugin_dev.tiny_models import tiny_torchvision
from tests.sampling import sampled
from tests.several import X, logits, model
from tests.tiny import tiny


def step(*attachments: petune.Attachment) -> None:
    built = attachments[0].model
    built.train()
    params = {id(p): p for att in attachments for p in att.parameters()}
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    nn.functional.cross_entropy(built(X), torch.arange(len(X)) % 3).backward()
    for att in attachments:
        att.check_gradients()
    optimizer.step()
    optimizer.zero_grad()


STACKS = [("adaptformer", "bitfit"), ("bitfit", "adaptformer"), ("lora", "norm"), ("vpt", "lora"), ("bitfit", "lora")]


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
@pytest.mark.parametrize("last_first", [True, False])
def test_stacked_train_together_and_come_off_in_any_order(stack: tuple[str, str], last_first: bool) -> None:
    built = model()
    plain, state = logits(built), copy.deepcopy(built.state_dict())
    atts = [petune.attach(built, name) for name in stack]
    before = [{k: p.detach().clone() for k, p in att.tuned.items()} for att in atts]
    for _ in range(3):
        step(*atts)
    for att, old in zip(atts, before, strict=True):
        assert all(p.requires_grad for p in att.parameters())
        assert any(not torch.equal(p, old[k]) for k, p in att.tuned.items())
    trained = {id(p) for att in atts for p in att.parameters()}
    assert all(p.requires_grad == (id(p) in trained) for p in built.parameters())
    for att in reversed(atts) if last_first else atts:
        att.detach()
    assert torch.equal(logits(built), plain)
    assert list(built.state_dict()) == list(state)
    assert all(p.requires_grad for p in built.parameters())
    assert not hasattr(built, "petune_trainable_state")
    assert not hasattr(built, "peft_config")


IN_TURN = [
    ("adaptformer", "bitfit"),
    ("bitfit", "adaptformer"),
    ("partial", "norm"),
    ("norm", "partial"),
    ("lora", "full"),
    ("bitfit", "adaptformer", "bitfit"),
    ("bitfit", "adaptformer", "full"),
    ("full", "lora", "bitfit"),
]
KEPT_IN_TURN = {("partial", "norm"), ("lora", "full"), ("bitfit", "adaptformer", "bitfit")}


@pytest.mark.parametrize("stack", sampled([(stack,) for stack in IN_TURN], KEPT_IN_TURN.__contains__), ids="+".join)
def test_stacked_is_saved_and_loaded_in_turn(stack: tuple[str, ...], tmp_path: Path) -> None:
    built = model()
    names = [f"{method}{index}" for index, method in enumerate(stack)]
    atts = [petune.attach(built, method, name=name) for method, name in zip(stack, names, strict=True)]
    for _ in range(2):
        step(*atts)
    for att in atts:
        att.save(tmp_path / att.name)
    fresh = model()
    for name in names:
        petune.load(fresh, tmp_path / name, name=name)
    assert torch.equal(logits(fresh), logits(built))


def test_stacked_is_not_loaded_in_another_order(tmp_path: Path) -> None:
    built = model()
    atts = [petune.attach(built, name) for name in ("adaptformer", "bitfit")]
    step(*atts)
    for att in atts:
        att.save(tmp_path / att.name)
    fresh = model()
    petune.load(fresh, tmp_path / "bitfit")
    with pytest.raises(BackboneMismatch, match="in the order in which they were attached"):
        petune.load(fresh, tmp_path / "adaptformer")


def test_a_value_that_a_later_attachment_did_not_keep_is_an_error(tmp_path: Path) -> None:
    built = model()
    first = petune.attach(built, "adaptformer")
    petune.attach(built, "bitfit", keep_original=False)
    with pytest.raises(AttachError, match="keep_original=True"):
        first.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_counts_leave_others_out() -> None:
    built = model()
    single = petune.attach(model(), "bitfit").counts
    petune.attach(built, "adaptformer")
    stacked = petune.attach(built, "bitfit").counts
    assert (stacked.tuned, stacked.backbone) == (single.tuned, single.backbone)


def test_names_must_differ() -> None:
    built = model()
    petune.attach(built, "lora", name="a")
    petune.attach(built, "lora", name="b")
    with pytest.raises(AttachError, match="'a' is attached"):
        petune.attach(built, "linear", name="a")
    assert set(built.petune_trainable_state.attachments) == {"a", "b"}


def filled(att: petune.Attachment, value: float) -> petune.Attachment:
    with torch.no_grad():
        for p in att.parameters():
            p.fill_(value)
    return att


@pytest.mark.parametrize("first_enabled", [True, False])
def test_what_two_train_is_restored_in_any_order(first_enabled: bool) -> None:
    built = model()
    plain = logits(built)
    a = filled(petune.attach(built, "linear", name="a"), 0.1)
    of_a = logits(built)
    b = filled(petune.attach(built, "linear", name="b"), 0.2)
    of_b = logits(built)
    a.disable()
    assert torch.equal(logits(built), of_b)  # the last one that is enabled counts
    b.disable()
    assert torch.equal(logits(built), plain)
    for att in (a, b) if first_enabled else (b, a):
        att.enable()
    assert torch.equal(logits(built), of_b)
    b.disable()
    assert torch.equal(logits(built), of_a)
    filled(a, 0.3)
    trained_later = logits(built)
    b.enable()
    b.detach()
    assert torch.equal(logits(built), trained_later)
    a.detach()
    assert torch.equal(logits(built), plain)


def test_one_that_is_disabled_while_another_attaches_keeps_its_values() -> None:
    built = model()
    plain = logits(built)
    a = filled(petune.attach(built, "linear", name="a"), 0.1)
    of_a = logits(built)
    a.disable()
    b = filled(petune.attach(built, "linear", name="b"), 0.2)
    b.disable()
    a.enable()
    assert torch.equal(logits(built), of_a)
    a.detach()
    assert torch.equal(logits(built), plain)
    b.enable()
    b.detach()
    assert torch.equal(logits(built), plain)


@pytest.mark.parametrize("method", ["adaptformer", "bitfit", "full"])
def test_one_that_is_disabled_is_saved_as_trained(method: str, tmp_path: Path) -> None:
    built = model()
    att = filled(petune.attach(built, method), 0.05)
    trained = logits(built)
    with att.disabled():
        att.save(tmp_path)
    fresh = model()
    petune.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), trained)
    att.disable()
    if method == "bitfit":
        att.merge()
        assert torch.equal(logits(built), trained)
    else:
        att.detach()
    with pytest.raises(AttachError, match="detached or merged"):
        att.save(tmp_path / "late")
    assert not (tmp_path / "late").exists()


def test_an_attachment_is_not_copied() -> None:
    with pytest.raises(AttachError, match="Copy the model"):
        copy.deepcopy(petune.attach(model(), "adaptformer"))


def beit() -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    built = timm.create_model("beit_base_patch16_224", **shape).eval()
    for p in built.parameters():
        nn.init.normal_(p, std=0.1)
    return built


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_two_need_called_is_called_until_the_last_goes(first: bool) -> None:
    built = beit()
    plain = logits(built)
    atts = [petune.attach(built, "lora", name=name) for name in "ab"]
    gone, stays = atts if first else reversed(atts)
    filled(stays, 0.05)
    with gone.disabled():
        alive = logits(built)
        with stays.disabled():
            assert torch.equal(logits(built), plain)
    gone.detach()
    assert torch.equal(logits(built), alive)
    with torch.no_grad():
        for key, p in stays.tuned.items():
            p.add_(torch.randn_like(p)) if "qkv" in key else None
    assert not torch.equal(logits(built), alive)
    stays.detach()
    assert torch.equal(logits(built), plain)
    assert not any(block.attn.qkv_bias_separate for block in built.blocks)


@pytest.mark.parametrize("method", ["full", "partial"])
def test_what_trains_the_backbone_leaves_others_adapters_alone(method: str, tmp_path: Path) -> None:
    built = model()
    other = petune.attach(built, "adaptformer")
    att = petune.attach(built, method)
    assert att.counts.tuned == petune.attach(model(), method).counts.tuned
    assert att.tuned.keys().isdisjoint(other.tuned)
    other.detach()
    filled(att, 0.05).save(tmp_path)
    fresh = model()
    petune.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(built))


@pytest.mark.parametrize("method", ["lora", "adaptformer", "l2sp", "peft:adalora"])
def test_one_tuner_on_two_models_mixes_nothing(method: str, tmp_path: Path) -> None:
    tuner = build_tuner(method)
    first, second = petune.attach(tiny(), tuner, name="a"), petune.attach(tiny(seed=1), tuner, name="a")
    first.save(tmp_path / "a")
    again = petune.load(tiny(), tmp_path / "a")
    assert again.counts.tuned == first.counts.tuned
    first.model(X).sum().backward()
    loss = first.loss(0)
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        loss.backward()
    assert all(p.grad is None for p in second.parameters())


@pytest.mark.filterwarnings("ignore:VisionTransformer reads the weights")
def test_lora_of_other_blocks_of_fused_attentions_is_refused_before_peft_does() -> None:
    model = tiny_torchvision()
    att = petune.attach(model, "lora", blocks="last:1")
    with pytest.raises(petune.AttachError, match=r"in_proj_weight.*same blocks.*copy of the model"):
        petune.attach(model, "lora", name="all")
    petune.attach(model, "lora", blocks="last:1", name="same").detach()
    att.detach()
    assert petune.attach(model, "lora").tuned
