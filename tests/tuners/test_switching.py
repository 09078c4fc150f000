"""Enabled, disabled, merged and detached in any order: nothing happens twice, and what cannot be undone is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import AttachError, BackboneMismatch, CheckpointError, NotMergeable
from petune.tuners.adaptformer import AdaptFormer
from tests.tiny import randomised, tiny

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
WIDTHS = {"embed_dim": 24, "depth": 2, "num_heads": 2}
POSITIONS: dict[str, dict[str, Any]] = {  # one for each way in which attentions know positions
    "beit_base_patch16_224": WIDTHS,
    "eva02_tiny_patch14_224": {**WIDTHS, "patch_size": 16},
    "vit_relpos_small_patch16_224": WIDTHS,
    "swin_tiny_patch4_window7_224": {"window_size": 4, "embed_dim": 24, "depths": [2], "num_heads": [2]},
    "swinv2_tiny_window8_256": {"window_size": 4, "embed_dim": 24, "depths": [2], "num_heads": [2]},
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, img_size=64, num_classes=3, **POSITIONS[name])
    nn.init.normal_(model.get_classifier().weight)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)  # Swin-V2 starts with blocks that add nothing
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, x: Tensor = X) -> Tensor:
    return model.eval()(x)


@pytest.mark.parametrize("name", POSITIONS)
def test_disabled_prompts_can_be_detached(name: str, tmp_path: Path) -> None:
    model = built(name)
    plain, state = logits(model), copy.deepcopy(model.state_dict())
    att = randomised(petune.attach(model, "vpt", num_prompts=2))
    prompted = logits(model)
    assert not torch.equal(prompted, plain)
    att.save(tmp_path / "a")
    for _ in range(2):
        att.disable()
        assert torch.equal(logits(model), plain)
        att.enable()
        assert torch.equal(logits(model), prompted)
    att.disable()
    att.detach()
    assert torch.equal(logits(model), plain)
    assert list(model.state_dict()) == list(state)
    bank = petune.AdapterBank(model)
    bank.load("one", tmp_path / "a")
    bank.load("two", tmp_path / "a")
    bank.remove("one")
    assert torch.equal(logits(bank.use("two")), prompted)
    bank.remove("two")
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", POSITIONS)
def test_prompts_of_two_take_turns(name: str) -> None:
    model = built(name)
    plain = logits(model)
    first = randomised(petune.attach(model, "vpt", num_prompts=2))
    with_first = logits(model)
    first.disable()
    second = randomised(petune.attach(model, "vpt", num_prompts=3, name="second"))
    with_second = logits(model)
    with pytest.raises(AttachError, match="prompts of another attachment"):
        first.enable()
    assert not first.enabled
    assert torch.equal(logits(model), with_second)
    second.disable()
    first.enable()
    assert torch.equal(logits(model), with_first)
    second.detach()
    assert torch.equal(logits(model), with_first)
    first.detach()
    assert torch.equal(logits(model), plain)


class WithBatchNorm(nn.Module):
    """A classifier that normalises as MAE's linear probe does."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(24), nn.Linear(24, classes)

    def forward(self, x_BD: Tensor) -> Tensor:
        out: Tensor = self.linear(self.norm(x_BD))
        return out


def with_batch_norm(seed: int = 0) -> nn.Module:
    model = tiny()
    torch.manual_seed(seed)
    model.head = WithBatchNorm(5)
    return model.eval()


def test_tasks_have_the_statistics_of_their_classifiers(tmp_path: Path) -> None:
    x, names = X[..., :16, :16], ["a", "b"]
    single = {}
    for seed, name in enumerate(names):
        att = randomised(petune.attach(with_batch_norm(), "adaptformer"))
        statistics = att.model.head.norm
        statistics.running_mean.fill_(seed + 1.0)
        statistics.running_var.fill_(seed + 2.0)
        att.save(tmp_path / name)
        single[name] = logits(att.model, x)
    bank = petune.AdapterBank(with_batch_norm())
    for name in names:
        bank.load(name, tmp_path / name)
    with torch.no_grad():
        mixed = bank(x, names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], single[name][row])
        bank.use(name)
        assert torch.equal(logits(bank.model, x), single[name])


class Folds(nn.Module):
    """A change of the site's bias that can be folded."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift

    def merge(self, module: nn.Module) -> None:
        with torch.no_grad():
            module.bias.add_(self.shift)


class Shift(petune.Tuner[petune.TunerConfig]):
    """Folds into the bias that bitfit trains."""

    Config = petune.TunerConfig

    def attach(self, edit: petune.Edit) -> None:
        fc2 = edit.linear_layers(edit.sites.blocks[0].mlp)[-1]
        edit.after(fc2, Folds(24))


@pytest.mark.parametrize("first", [True, False])
def test_nothing_is_folded_into_what_another_attachment_restores(first: bool) -> None:
    model, x = tiny(), X[..., :16, :16]
    order: list[Callable[[], petune.Attachment]] = [
        lambda: petune.attach(model, Shift(), name="shift"),
        lambda: petune.attach(model, "bitfit"),
    ]
    attached = [attach() for attach in (order if first else order[::-1])]
    shift, bitfit = attached if first else attached[::-1]
    randomised(shift)
    before = logits(model, x)
    with pytest.raises(NotMergeable, match="bitfit trains in place"):
        shift.merge()
    assert torch.equal(logits(model, x), before)
    assert shift.attached
    assert shift.enabled
    shift.disable()
    with pytest.raises(NotMergeable, match="Merge or detach bitfit first"):
        shift.merge()
    assert not shift.enabled
    shift.enable()
    bitfit.merge()
    shift.merge()
    torch.testing.assert_close(logits(model, x), before)
    assert not hasattr(model, "petune_trainable_state")


def test_a_classifier_that_does_not_train_belongs_to_the_file(tmp_path: Path) -> None:
    randomised(petune.attach(tiny(), "adaptformer", train_head=False)).save(tmp_path / "a")
    assert petune.load(tiny(), tmp_path / "a").head == {}
    other, wider = tiny(), tiny()
    nn.init.normal_(other.head.weight)
    wider.reset_classifier(7)
    for wrong in (other, wider):
        with pytest.raises(BackboneMismatch, match=r"train_head=False"):
            petune.load(wrong, tmp_path / "a")
    trained = tiny()
    petune.attach(trained, "linear")
    nn.init.normal_(trained.head.weight)
    with pytest.raises(BackboneMismatch, match=r"train_head=False"):
        petune.load(trained, tmp_path / "a")


def test_a_tuner_must_have_the_options_of_the_file(tmp_path: Path) -> None:
    randomised(petune.attach(tiny(), "adaptformer", bottleneck=4)).save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"scale is None there and 1\.0 here.* AdaptFormer"):
        petune.load(tiny(), tmp_path / "a", tuner=AdaptFormer(bottleneck=4, scale=1.0))
    assert petune.load(tiny(), tmp_path / "a", tuner=AdaptFormer(bottleneck=4)).attached


@pytest.mark.parametrize("method", ["bitfit", "adaptformer"])
def test_tensors_that_were_replaced_cannot_be_restored_silently(method: str) -> None:
    att = petune.attach(tiny(), method)
    att.model.load_state_dict(att.model.state_dict(), assign=True)
    for give_back in (att.detach, lambda: att.disable(), lambda: att.disabled().__enter__()):
        with pytest.raises(AttachError, match="assign=True"):
            give_back()
    assert att.attached
    assert att.enabled
    if att.tuner.method == "bitfit":
        with pytest.raises(AttachError, match="assign=True"):
            att.merge()


def test_statistics_that_full_moves_are_not_those_of_a_still_classifier(tmp_path: Path) -> None:
    att = petune.attach(with_batch_norm(), "full", train_head=False)
    att.train()(X[..., :16, :16])
    assert att.model.head.norm.running_mean.any()
    expected = logits(att.model, X[..., :16, :16])
    att.save(tmp_path / "a")
    fresh = with_batch_norm()
    petune.load(fresh, tmp_path / "a")
    assert torch.equal(logits(fresh, X[..., :16, :16]), expected)


def test_disabled_prompts_belong_to_the_same_backbone(tmp_path: Path) -> None:
    """Swin-V2 has a buffer of the pairs of tokens, which prompts replace."""
    name = "swinv2_tiny_window8_256"
    att = randomised(petune.attach(built(name), "vpt", num_prompts=2))
    prompted = logits(att.model)
    att.save(tmp_path / "on")
    with att.disabled():
        att.save(tmp_path / "off")
    for path in ("on", "off"):
        fresh = built(name)
        petune.load(fresh, tmp_path / path)
        assert torch.equal(logits(fresh), prompted)


def test_a_buffer_that_modules_share_is_saved_once() -> None:
    model = tiny()
    table = torch.ones(3)
    for block in model.blocks:
        block.register_buffer("table", table)
    assert [key for key in petune.attach(model, "full").state() if "table" in key] == ["blocks.0.table"]


def test_after_a_move_to_another_device_all_buffers_are_there() -> None:
    att = petune.attach(built("swinv2_tiny_window8_256"), "vpt", num_prompts=2)
    for module in att.model.modules():  # parameters stay, as they do in a move to a GPU
        module._buffers.update({name: b.to("meta") for name, b in module._buffers.items() if b is not None})
    for call in (att.disable, att.enable, att.detach):
        call()
        assert all(buffer.is_meta for buffer in att.model.buffers())
