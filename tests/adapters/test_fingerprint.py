"""The fingerprint: computed once while nothing changes, and again when a tensor has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import petune
import petune.adapters.fingerprint
from tests.tiny import tiny

Change = Callable[[nn.Module], Any]


def weight(model: nn.Module) -> nn.Parameter:
    fc1: nn.Parameter = model.blocks[1].mlp.fc1.weight
    return fc1


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    weight(model)[3, 4] += 1e-6


@torch.no_grad()
def in_place_through_a_view(model: nn.Module) -> None:
    weight(model).view(-1)[5:6].add_(1.0)


def through_data(model: nn.Module) -> None:
    weight(model).data.mul_(1 + 1e-6)  # PyTorch does not count this


def other_storage(model: nn.Module) -> None:
    weight(model).data = weight(model).data.clone().mul_(2)


def other_parameter(model: nn.Module) -> None:
    model.blocks[1].mlp.fc1.weight = nn.Parameter(weight(model).detach() + 1)


def loaded(model: nn.Module) -> None:
    state = {key: t.clone() for key, t in model.state_dict().items()}
    state["blocks.1.mlp.fc1.weight"][0, 0] += 1
    model.load_state_dict(state)


def optimised(model: nn.Module) -> None:
    weight(model).grad = torch.ones_like(weight(model))
    torch.optim.SGD([weight(model)], lr=1e-4).step()


def another_type(model: nn.Module) -> None:
    model.double()


CHANGES = [
    in_place,
    in_place_through_a_view,
    through_data,
    other_storage,
    other_parameter,
    loaded,
    optimised,
    another_type,
]


def fresh(att: petune.Attachment) -> str:
    """The fingerprint of a copy, which has no cache."""
    return petune.attach(copy.deepcopy(att.model), "adaptformer", train_head=False, name="other").fingerprint()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: Change) -> None:
    att = petune.attach(tiny(), "adaptformer")
    before = att.fingerprint()
    assert att.fingerprint() == before
    change(att.model)
    after = att.fingerprint()
    assert after not in {before, ""}
    assert after == fresh(att)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows whenever a whole backbone is hashed."""
    count: list[int] = []

    def digest(*arguments: Any) -> str:
        count.append(1)
        return whole(*arguments)

    whole = petune.adapters.fingerprint.digest
    monkeypatch.setattr(petune.adapters.fingerprint, "digest", digest)
    return count


def test_what_has_not_changed_is_read_once(reads: list[int], tmp_path: Any) -> None:
    model = tiny()
    for name in ("adaptformer", "vpt", "lora"):
        att = petune.attach(model, name)
        att.save(tmp_path / name)
        att.detach()
    assert len(reads) == 1
    bank = petune.AdapterBank(model)
    for number, name in enumerate(["adaptformer", "vpt", "lora", "adaptformer", "vpt"]):
        bank.load(str(number), tmp_path / name)
        bank.use(str(number))
    assert len(reads) == 1
    petune.load(copy.deepcopy(tiny()), tmp_path / "vpt")
    assert len(reads) == 2


def test_each_method_has_its_own_frozen_tensors(reads: list[int]) -> None:
    model = tiny()
    atts = [petune.attach(model, name) for name in ("adaptformer", "bitfit", "norm")]
    assert len({att.fingerprint() for att in atts}) == 3
    assert len(reads) == 3
    assert [att.fingerprint() for att in atts] == [att.fingerprint() for att in atts]
    assert len(reads) == 3


def test_tensors_without_a_version_are_read_every_time(reads: list[int]) -> None:
    model = tiny()
    with torch.inference_mode():
        model.register_buffer("table", torch.ones(3))
    att = petune.attach(model, "adaptformer")
    assert att.fingerprint() == att.fingerprint()
    assert len(reads) == 2
