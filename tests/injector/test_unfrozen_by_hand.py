"""Tensors that a user unfreezes or changes after attaching: no adapter file contains them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import petune
from tests.sampling import sampled
from tests.tiny import X, tiny

STARTS: list[Callable[[petune.Attachment], Any]] = [
    lambda att: att.parameters(),
    lambda att: att.param_groups(),
    lambda att: att.on_train_start(10),
]


@pytest.mark.parametrize("start", STARTS)
def test_training_does_not_start_with_them(start: Callable[[petune.Attachment], Any]) -> None:
    model = tiny()
    att = petune.attach(model, "adaptformer")
    model.norm.requires_grad_(True)
    with pytest.raises(petune.AttachError, match=r"norm\.weight, norm\.bias"):
        start(att)
    model.norm.requires_grad_(False)
    start(att)


def test_what_is_put_in_after_attaching_is_named_too() -> None:
    model = tiny()
    att = petune.attach(model, "adaptformer")
    model.norm = torch.nn.LayerNorm(model.norm.normalized_shape)
    model.blocks[0].extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(petune.AttachError, match=r"blocks\.0\.extra.*norm\.weight"):
        att.parameters()


def test_saving_names_them_and_loses_nothing(tmp_path: Path) -> None:
    model = tiny()
    att = petune.attach(model, "adaptformer")
    model.norm.requires_grad_(True)
    with torch.no_grad():
        model.norm.weight.add_(1)
    with pytest.warns(UserWarning, match=r"norm\.weight, norm\.bias"):
        att.save(tmp_path / "out")
    backbone = tiny()
    with torch.no_grad():
        backbone.norm.weight.add_(1)
    petune.load(backbone, tmp_path / "out")


def test_what_any_attachment_trains_is_not_among_them() -> None:
    model = tiny()
    first = petune.attach(model, "adaptformer")
    petune.attach(model, "norm").disable()
    assert first.parameters()


def test_a_detached_attachment_names_nothing() -> None:
    model = tiny()
    att = petune.attach(model, "adaptformer")
    att.detach()
    assert att.parameters()


def freeze_again(model: Any) -> None:
    model.norm.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([model.norm.weight], lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    model.norm.weight.requires_grad_(False)


def write_through_data(model: Any) -> None:
    model.norm.weight.data[3] += 1


def write_in_place(model: Any) -> None:
    with torch.no_grad():
        model.norm.weight.mul_(2)


@pytest.mark.parametrize("change", [freeze_again, write_through_data, write_in_place])
@pytest.mark.parametrize("method", sampled(["adaptformer", "lora", "vpt", "bitfit"], {"lora", "vpt"}.__contains__))
def test_saving_names_frozen_tensors_that_changed(change: Callable[[Any], None], method: str, tmp_path: Path) -> None:
    model = tiny()
    att = petune.attach(model, method)
    change(model)
    with pytest.warns(UserWarning, match=r"1 tensor of .*\(norm\.weight\)"):
        att.save(tmp_path / "out")
    backbone = tiny()
    with torch.no_grad():
        backbone.norm.weight.copy_(model.norm.weight)
    petune.load(backbone, tmp_path / "out")


def test_a_changed_buffer_and_a_changed_classifier_that_does_not_train_are_named(tmp_path: Path) -> None:
    model = tiny()
    model.register_buffer("scale", torch.ones(1, dtype=torch.int64))
    att = petune.attach(model, "adaptformer", train_head=False)
    model.scale += 1
    model.head.bias.data += 1
    with pytest.warns(UserWarning, match=r"head\.bias, scale"):
        att.save(tmp_path / "out")


def saves_without_a_warning(att: petune.Attachment, path: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        att.save(path)
    return True


def test_values_that_are_the_same_again_are_not_named(tmp_path: Path) -> None:
    model = tiny()
    att = petune.attach(model, "adaptformer")
    copied = copy.deepcopy(model)
    model.load_state_dict(copied.state_dict())
    assert saves_without_a_warning(att, tmp_path / "out")


def test_what_attachments_change_is_not_named(tmp_path: Path) -> None:
    model = tiny()
    norm, lora = petune.attach(model, "norm"), petune.attach(model, "lora")
    att = petune.attach(model, "adaptformer")
    with torch.no_grad():
        for p in (*norm.tuned.values(), *lora.tuned.values()):
            p.add_(0.01)
    assert saves_without_a_warning(att, tmp_path / "enabled")
    norm.disable()
    assert saves_without_a_warning(att, tmp_path / "disabled")
    norm.enable()
    norm.merge()
    lora.merge()
    assert saves_without_a_warning(att, tmp_path / "merged")
    petune.load(tiny_with_values_of(model), tmp_path / "merged")


def tiny_with_values_of(model: Any) -> Any:
    backbone = tiny()
    own = backbone.state_dict()
    backbone.load_state_dict({key: t for key, t in model.state_dict().items() if key in own})
    return backbone


def test_a_merge_does_not_hide_what_was_changed_by_hand(tmp_path: Path) -> None:
    model = tiny()
    lora, att = petune.attach(model, "lora"), petune.attach(model, "adaptformer")
    write_in_place(model)
    lora.merge()
    with pytest.warns(UserWarning, match=r"norm\.weight"):
        att.save(tmp_path / "out")


def test_values_in_another_order_are_named(tmp_path: Path) -> None:
    model = tiny()
    att = petune.attach(model, "adaptformer")
    for weight, dim in ((model.patch_embed.proj.weight, 1), (model.pos_embed, 1), (model.norm.weight, 0)):
        weight.data = weight.data.flip(dim)
    with pytest.warns(UserWarning, match=r"patch_embed\.proj\.weight, pos_embed|pos_embed, patch_embed\.proj\.weight"):
        att.save(tmp_path / "out")


def test_a_parameter_may_begin_anywhere_in_its_memory(tmp_path: Path) -> None:
    model = tiny()
    model.norm.weight = torch.nn.Parameter(torch.ones(25)[1:])
    att = petune.attach(model, "adaptformer")
    assert saves_without_a_warning(att, tmp_path / "same")
    model.norm.weight.data[3] += 1
    with pytest.warns(UserWarning, match=r"norm\.weight"):
        att.save(tmp_path / "out")
