"""Strangers' ViTs far from timm's style: each method is right, or refused with a reason that can be acted on."""

from __future__ import annotations

import random

import pytest
import torch
from survey.pairs import examine
from survey.residual_stream import unproven_mids
from torch import Tensor, nn

import petune
from tests.tiny import module_beside

strangers = module_beside(__file__, "strangers")
REFUSED = {
    ("functional", "adaptformer"): r"block 0 \(body.0\) of Functional has no site 'mid'",
    ("functional", "lora"): "needs linear layers that are called, but Functional calls none",
    ("reversible", "adaptformer"): "block 1 .* has no site 'mid'",
    ("reversible", "vpt"): "fails with the method attached",
    ("reversible", "vpt:deep=false"): "does not run with them",
    ("Keras", "vpt:deep=false"): "into its attention only",
    ("windows joined at the end", "vpt:deep=false"): "into its attention only",
    ("sequence first", "vpt"): "has no token-to-token attention where they enter",
    ("sequence first", "vpt:deep=false"): "has no token-to-token attention where they enter",
}
"""Why, where it is: there is no place between modules, two streams are no one's prompts, tokens come first."""


@pytest.mark.parametrize("name", strangers.STRANGERS)
def test_its_blocks_and_its_head_are_found(name: str) -> None:
    model = strangers.stranger(name)
    sites = petune.find_sites(model)
    assert (len(sites.blocks), sites.embed_dim) == (strangers.DEPTH, strangers.D)  # class attention pools
    assert sites.head.enter is [m for m in model.modules() if getattr(m, "out_features", 0) == 3][-1]
    assert unproven_mids(model, sites) == []


@pytest.mark.parametrize("name", strangers.STRANGERS)
@pytest.mark.parametrize("method", ["adaptformer:bottleneck=4", "vpt", "vpt:deep=false", "lora"])
def test_every_method_is_right_or_refused(name: str, method: str) -> None:
    outcome = examine(strangers.stranger(name), method)
    reason = REFUSED.get((name, method.removesuffix(":bottleneck=4")))
    assert outcome.state == ("refused" if reason else "ok"), outcome.detail
    if reason:
        with pytest.raises(petune.PetuneError, match=reason):
            petune.attach(strangers.stranger(name), method.partition(":")[0], **_options(method))


def _options(method: str) -> dict[str, bool]:
    return {"deep": False} if method.endswith("deep=false") else {}


class Masked(nn.Module):
    """A masked autoencoder's encoder: other patches are dropped in each forward."""

    def __init__(self, draw: str) -> None:
        super().__init__()
        self.image_size, self.draw = 16, draw
        self.inner = strangers.stranger("class attention")

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.rand(1, 1, 16, 16) if self.draw == "torch" else random.random()
        return self.inner(x * keep)


@pytest.mark.parametrize("draw", ["torch", "python"])
@pytest.mark.parametrize("method", ["linear", "vpt"])
def test_a_backbone_that_draws_in_eval_is_refused(draw: str, method: str) -> None:
    model = Masked(draw)
    with pytest.raises(petune.AttachError, match=r"Masked draws random numbers in eval mode.* encoder"):
        petune.attach(model, method)
    assert not any(hasattr(m, "petune") for m in model.modules())


def test_a_random_number_without_effect_is_no_reason() -> None:
    class Draws(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + 0 * torch.rand(()))

    assert petune.attach(Draws("torch"), "linear").counts.tuned == 0
