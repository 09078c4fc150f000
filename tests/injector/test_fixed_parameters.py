"""Parameters that a tuner adds with `requires_grad=False` do not train, and are saved as buffers are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import petune
from tests.tiny import X, tiny, trained


class RandomFeatures(nn.Module):
    """A fixed random projection, and a matrix behind it that trains."""

    def __init__(self, *, all_fixed: bool = False) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(4, 24), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(24, 4), requires_grad=not all_fixed)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.T @ self.up.T


class Config(petune.TunerConfig):
    all_fixed: bool = False
    by_hand: bool = False


class Fixed(petune.Tuner[Config]):
    """Random features parallel to every MLP."""

    def attach(self, edit: petune.Edit) -> None:
        for block in edit.sites.blocks:
            adapter = RandomFeatures(all_fixed=self.config.all_fixed)
            edit.parallel(block.mid, block, adapter)
        if self.config.by_hand:
            edit.model.noise = nn.Parameter(torch.ones(3), requires_grad=False)
            edit.add_parameters([edit.model.noise])
            edit.on_detach(lambda: delattr(edit.model, "noise"))


@pytest.mark.parametrize("by_hand", [False, True])
def test_they_are_saved_and_do_not_train(by_hand: bool, tmp_path: Path) -> None:
    att = petune.attach(tiny(), Fixed(by_hand=by_hand))
    before = {key: p.clone() for key, p in att.model.named_parameters() if key.endswith(("down", "noise"))}
    assert att.counts.tuned == 2 * 24 * 4
    assert not [key for key in before if key in att.tuned]
    trained(att)
    for key, p in att.model.named_parameters():
        if key in before:
            assert torch.equal(p, before[key])
            assert not p.requires_grad
    att.save(tmp_path / "a")
    assert set(load_file(tmp_path / "a" / "adapter_model.safetensors")) == {*att.tuned, *att.head, *before}
    fresh = tiny()
    again = petune.load(fresh, tmp_path / "a", tuner=Fixed(by_hand=by_hand))
    assert torch.equal(fresh(X), att.model(X))
    again.detach()
    assert torch.equal(fresh(X), tiny()(X))


def test_they_stay_fixed_next_to_another_attachment(tmp_path: Path) -> None:
    att = petune.attach(tiny(), Fixed())
    other = petune.attach(att.model, "adaptformer")
    assert not [key for key, p in att.model.named_parameters() if key.endswith("down") and p.requires_grad]
    with other.disabled():
        att.save(tmp_path / "a")
    fresh = tiny()
    petune.load(fresh, tmp_path / "a", tuner=Fixed())
    with other.disabled():
        assert torch.equal(fresh(X), att.model(X))


def test_a_tuner_that_trains_none_of_what_it_adds_is_refused() -> None:
    model = tiny()
    with pytest.raises(petune.AttachError, match=r"requires_grad=False.*down.*buffers"):
        petune.attach(model, Fixed(all_fixed=True))
    assert torch.equal(model(X), tiny()(X))
