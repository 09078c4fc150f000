"""Parameters that the model's author fixed with requires_grad=False stay as they are; a model frozen by hand trains."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.tiny import X, tiny, trained


class Masked(nn.Module):
    """An attention with a mask of zeros and -inf as a parameter that does not train."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.mask = nn.Parameter(torch.full((1, 17, 1), 0.0), requires_grad=False)
        self.mask.data[:, 5] = -torch.inf

    def forward(self, x: Tensor, **options: object) -> Tensor:
        return self.inner(x * self.mask.exp(), **options)


def masked() -> nn.Module:
    """A ViT with fixed positions and masks."""
    model = tiny()
    model.pos_embed.requires_grad_(False)
    for block in model.blocks:
        block.attn = Masked(block.attn)
    return model


FIXED = ["pos_embed", "blocks.0.attn.mask", "blocks.1.attn.mask"]


def test_methods_leave_them_and_say_so() -> None:
    for method, left in (("full", FIXED), ("partial", FIXED[2:])):
        model = masked()
        before = {key: p.clone() for key, p in model.named_parameters() if key in FIXED}
        with pytest.warns(UserWarning, match=f"leaves {len(left)} parameter.*{left[-1]}"):
            att = petune.attach(model, method)
        trained(att)
        assert not {*FIXED} & att.tuned.keys()
        assert all(torch.equal(p, before[key]) for key, p in model.named_parameters() if key in FIXED)


@pytest.mark.parametrize(("path", "named"), [("blocks", "24 parameters.*blocks"), ("blocks.0", r"12 .*blocks\.0")])
def test_what_a_user_froze_trains_and_is_named(path: str, named: str) -> None:
    model = tiny()
    model.get_submodule(path).requires_grad_(False)
    with pytest.warns(UserWarning, match=f"full trains {named}.*requires_grad=False"):
        att = petune.attach(model, "full")
    assert len(att.tuned) + len(att.head) == len([*model.parameters()])


@pytest.mark.parametrize("method", ["full", "norm", "bitfit", "partial", "lora", "linear", "gps"])
@pytest.mark.parametrize("head_trains", [False, True])
def test_nothing_is_said_of_a_backbone_that_is_frozen_whole(method: str, head_trains: bool) -> None:
    model = tiny().requires_grad_(False)
    model.head.requires_grad_(head_trains)
    att = petune.attach(model, method)
    assert att.head.keys() == {"head.weight", "head.bias"}


def test_of_what_trains_only_frozen_parameters_are_named() -> None:
    model = tiny()
    model.blocks[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"norm trains 4 parameters .*\(blocks\.0\.norm1"):
        petune.attach(model, "norm").detach()
    petune.attach(model, "norm", blocks=[1])
    petune.attach(model, "lora", name="lora")


def test_a_head_that_a_user_froze_alone_is_named() -> None:
    model = tiny()
    model.head.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"2 parameters .*head\.weight.*train_head=False"):
        petune.attach(model, "lora").detach()
    petune.attach(model, "lora", train_head=False)


def test_masks_of_a_frozen_model_stay() -> None:
    with pytest.warns(UserWarning, match="leaves 2 parameters"):
        att = petune.attach(masked().requires_grad_(False), "full")
    assert {*FIXED} & att.tuned.keys() == {"pos_embed"}


@pytest.mark.parametrize("saved_frozen", [False, True])
@pytest.mark.filterwarnings("ignore:.* leaves")
def test_a_model_frozen_otherwise_loads_it(saved_frozen: bool, tmp_path: Path) -> None:
    """The file says what was trained, however the model is frozen that it is loaded into."""
    model, fresh = masked(), masked()
    (model if saved_frozen else fresh).requires_grad_(False)
    att = trained(petune.attach(model, "full"))
    att.save(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        petune.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(X), att.model(X))


@pytest.mark.parametrize("method", ["full", "bitfit", "partial"])
@pytest.mark.filterwarnings("ignore:.* leaves")
def test_a_model_in_which_nothing_is_frozen_loads_it(method: str, tmp_path: Path) -> None:
    model, fresh = tiny(), tiny()
    for path in ("pos_embed", "blocks.1.mlp.fc1.bias"):
        model.get_parameter(path).requires_grad_(False)
    att = trained(petune.attach(model, method))
    att.save(tmp_path / "a")
    loaded = petune.load(fresh, tmp_path / "a")
    assert loaded.tuned.keys() == att.tuned.keys()
    assert torch.equal(fresh(X), att.model(X))
    loaded.save(tmp_path / "b")
    petune.load(tiny(), tmp_path / "b")
