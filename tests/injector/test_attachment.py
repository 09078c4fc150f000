"""The public face of an attachment: how it prints, its recipe, its parameter groups, enabling and disabling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import petune
from tests.injector.test_edit import Custom
from tests.tiny import X, randomised, tiny


def test_it_prints_name_method_counts_and_state() -> None:
    att = petune.attach(tiny(), "adaptformer", name="pets", bottleneck=3)
    title, counts = str(att).splitlines()
    assert title == "pets: adaptformer (bottleneck=3) on VisionTransformer, enabled"
    assert counts == str(att.counts)
    with att.disabled():
        assert str(att).startswith("pets: adaptformer (bottleneck=3) on VisionTransformer, disabled")
    att.detach()
    assert str(att).startswith("pets: adaptformer (bottleneck=3) on VisionTransformer, detached")
    assert repr(att) == "<Attachment 'pets': adaptformer on VisionTransformer>"


def test_the_recipe_is_the_methods() -> None:
    att = petune.attach(tiny(), "vpt")
    assert att.recipe == att.tuner.recipe
    assert att.recipe.optimizer == "adamw"


def by_decay(att: petune.Attachment, weight_decay: float | None) -> dict[float, set[str]]:
    keys = {id(p): key for key, p in {**att.tuned, **att.head}.items()}
    groups = att.param_groups(weight_decay)
    return {group["weight_decay"]: {keys[id(p)] for p in group["params"]} for group in groups}


def test_matrices_decay_and_vectors_do_not() -> None:
    att = petune.attach(tiny(), "full")
    groups = by_decay(att, 0.1)
    assert groups.keys() == {0.1, 0.0}
    assert {"pos_embed", "cls_token", "blocks.0.norm1.weight", "head.bias"} <= groups[0.0]
    assert {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "head.weight"} <= groups[0.1]
    assert groups[0.0] | groups[0.1] == {*att.tuned, *att.head}


def test_prompts_decay_and_factors_written_as_a_row_do_not() -> None:
    assert all("prompt" not in key for key in by_decay(petune.attach(tiny(), "vpt"), 0.1)[0.0])
    ia3 = by_decay(petune.attach(tiny(), "peft:ia3"), 0.1)
    assert ia3[0.1] == {"head.weight"}


def test_the_groups_take_the_recipes_decay_and_train() -> None:
    att = petune.attach(tiny(), "adaptformer")
    decays = {group["weight_decay"] for group in att.param_groups()}
    assert decays <= {0.0, att.recipe.weight_decay}
    optimizer = torch.optim.AdamW(att.param_groups(0.05), lr=1e-2)
    before = {key: p.detach().clone() for key, p in att.head.items()}
    nn.functional.cross_entropy(att.train()(X), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert all(not torch.equal(p, before[key]) for key, p in att.head.items())


def test_a_model_that_names_its_undecayed_parameters_is_asked() -> None:
    model = tiny()
    model.no_weight_decay = lambda: {"head.weight"}
    groups = by_decay(petune.attach(model, "linear"), 0.1)
    assert groups == {0.0: {"head.weight", "head.bias"}}


@pytest.mark.parametrize("method", ["adaptformer", "bitfit"])
def test_enable_and_disable_may_be_repeated(method: str) -> None:
    model = tiny()
    plain = model(X)
    att = randomised(petune.attach(model, method))
    tuned = model(X)
    for _ in range(2):
        att.disable()
        assert not att.enabled
        assert torch.equal(model(X), plain)
    for _ in range(2):
        att.enable()
        assert torch.equal(model(X), tuned)
    att.disable()
    with att.disabled():
        pass
    assert not att.enabled
    att.detach()
    for call in (att.enable, att.disable, att.merge):
        with pytest.raises(petune.AttachError, match="detached"):
            call()


def test_what_is_merged_is_the_original_of_what_comes_after() -> None:
    model = tiny()
    first = randomised(petune.attach(model, "bitfit", train_head=False))
    second = petune.attach(model, "bitfit", name="second", train_head=False)
    second.disable()
    randomised(first)  # trained further while the second is disabled
    expected = model(X)
    first.merge()
    randomised(second).enable()
    second.detach()
    assert torch.equal(model(X), expected)


def test_a_disabled_method_leaves_the_backbone_frozen_and_in_eval_mode() -> None:
    model = tiny()
    model.blocks[0].mlp.norm = torch.nn.BatchNorm1d(17)
    full = petune.attach(model, "full", train_head=False)
    full.disable()
    att = petune.attach(model, "bitfit", train_head=False)
    before = model.blocks[0].mlp.norm.running_mean.clone()
    model.train()(X)
    assert torch.equal(model.blocks[0].mlp.norm.running_mean, before)
    assert [p for p in model.parameters() if p.requires_grad] == att.parameters()
    full.enable()
    assert all(p.requires_grad for p in full.parameters())
    model(X)
    assert not torch.equal(model.blocks[0].mlp.norm.running_mean, before)
    full.disable()
    assert not model.blocks[0].mlp.norm.training


def test_after_a_failed_attach_what_was_trained_since_is_merged() -> None:
    model = tiny()
    earlier, att = petune.attach(model, "linear", name="earlier"), petune.attach(model, "linear")
    with pytest.raises(petune.ConfigError):
        petune.attach(model, "linear", name="linear", blocks="last:9")
    with pytest.raises(petune.AttachError):
        petune.attach(model, Custom(lambda edit: edit.after(edit.site(model.head, 5), torch.nn.Linear(5, 4))), name="x")
    torch.nn.init.ones_(model.head.weight)
    att.merge()
    torch.nn.init.zeros_(model.head.weight)
    earlier.detach()
    assert torch.equal(model.head.weight, torch.ones(5, 24))


def test_it_may_be_detached_or_merged_while_it_is_disabled() -> None:
    model = tiny()
    for end in ("detach", "merge"):
        att = randomised(petune.attach(model, "lora", train_head=False))
        expected = model(X)
        with att.disabled():
            getattr(att, end)()
    torch.testing.assert_close(model(X), expected)
