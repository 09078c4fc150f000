"""The trainer's gradient check: dropout may skip whole modules in a step, but a dead parameter is an error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.training.gradient_check import check_step_gradients
from tests.tiny import X, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
SEED = 0


class HalfDead(petune.Tuner[petune.TunerConfig]):
    """An adapter with a parameter that its output does not depend on."""

    def attach(self, edit: petune.Edit) -> None:
        adapter = nn.Linear(24, 24)
        adapter.unused = nn.Parameter(torch.zeros(3))
        edit.parallel(edit.sites.blocks[0].mlp, edit.sites.blocks[0].mlp, adapter)


def trained_step(att: petune.Attachment) -> dict[str, Tensor | None]:
    """Do a backward in train mode; return the gradients."""
    att.train()
    torch.manual_seed(SEED)
    att.model(X).square().sum().backward()
    return {key: p.grad for key, p in {**att.tuned, **att.head}.items()}


def check(att: petune.Attachment, *, under_way: bool) -> None:
    params = {**att.tuned, **att.head}
    check_step_gradients(att, params, lambda: att.model(X).square().sum().backward(), under_way=under_way)


@pytest.mark.parametrize("under_way", [False, True])
@pytest.mark.parametrize("method", ["peft:loha", "peft:lokr"])
def test_modules_that_dropout_skips_are_not_dead(method: str, under_way: bool) -> None:
    torch.manual_seed(0)
    att = petune.attach(tiny(), method, module_dropout=0.9)
    with torch.no_grad():
        for p in att.tuned.values():
            p.normal_()
    gradients = trained_step(att)
    assert any(gradient is None for gradient in gradients.values())
    check(att, under_way=under_way)
    assert all(p.grad is gradients[key] for key, p in {**att.tuned, **att.head}.items())
    assert att.model.head.training


def test_a_parameter_that_the_output_does_not_depend_on_is_an_error() -> None:
    att = petune.attach(tiny(), HalfDead())
    gradients = trained_step(att)
    with pytest.raises(petune.DeadSite, match="unused"):
        check(att, under_way=False)
    assert all(p.grad is gradients[key] for key, p in {**att.tuned, **att.head}.items())
