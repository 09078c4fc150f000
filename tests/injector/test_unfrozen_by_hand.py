"""Parameters that a user unfreezes after attaching: they would train, and no adapter file would contain them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import petune
from tests.tiny import tiny

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
