"""ViTs in unusual styles: each method works, or is refused with a reason that helps."""

from __future__ import annotations

import random

import pytest
import torch
from survey.pairs import examine
from survey.residual_stream import unproven_mids
from torch import Tensor, nn

import petune
from tests.sampling import sampled
from tests.tiny import module_beside

models = module_beside(__file__, "unusual_models")
REFUSED = {
    ("functional", "adaptformer"): r"block 0 \(body.0\) of Functional has no site 'mid'",
    ("functional", "lora"): "needs linear layers that are called, but Functional calls none",
    ("reversible", "adaptformer"): "has no site 'mid'",
    ("reversible", "vpt"): "no token that reads them",
    ("reversible", "vpt:deep=false"): "does not run with them",
    ("Keras", "vpt:deep=false"): "into its attention only",
    ("windows joined at the end", "vpt:deep=false"): "into its attention only",
    ("sequence first", "vpt"): "has no token-to-token attention where they enter",
    ("sequence first", "vpt:deep=false"): "has no token-to-token attention where they enter",
}
"""Expected reasons: no tensor between modules, two streams, windows, or the batch dimension is not the first."""


@pytest.mark.parametrize("name", models.UNUSUAL)
def test_blocks_and_head_are_found(name: str) -> None:
    model = models.build(name)
    sites = petune.find_sites(model)
    assert (len(sites.blocks), sites.embed_dim) == (models.DEPTH, models.D)  # class attention pools
    assert sites.head.enter is [m for m in model.modules() if getattr(m, "out_features", 0) == 3][-1]
    assert unproven_mids(model, sites) == []


METHODS = ["adaptformer:bottleneck=4", "vpt", "vpt:deep=false", "lora"]
LIKE_OTHERS = {"one expert a token", "Keras", "keywords", "sequence first"}
"""Models whose blocks take the same paths as another model's, once their sites are found."""


@pytest.mark.parametrize("name", sampled(models.UNUSUAL, lambda name: name not in LIKE_OTHERS))
@pytest.mark.parametrize("method", sampled(METHODS, "adaptformer:bottleneck=4".__eq__))
def test_every_method_works_or_is_refused(name: str, method: str) -> None:
    outcome = examine(models.build(name), method)
    reason = REFUSED.get((name, method.removesuffix(":bottleneck=4")))
    assert outcome.state == ("refused" if reason else "ok"), outcome.detail
    if reason:
        with pytest.raises(petune.PetuneError, match=reason):
            petune.attach(models.build(name), method.partition(":")[0], **_options(method))


def _options(method: str) -> dict[str, bool]:
    return {"deep": False} if method.endswith("deep=false") else {}


class Masked(nn.Module):
    """A masked autoencoder's encoder: each forward drops other patches."""

    def __init__(self, draw: str) -> None:
        super().__init__()
        self.image_size, self.draw = 16, draw
        self.inner = models.build("class attention")

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.rand(1, 1, 16, 16) if self.draw == "torch" else random.random()
        return self.inner(x * keep)


@pytest.mark.parametrize("draw", ["torch", "python"])
@pytest.mark.parametrize("method", ["linear", "vpt"])
def test_random_numbers_in_eval_mode_are_refused(draw: str, method: str) -> None:
    model = Masked(draw)
    with pytest.raises(petune.AttachError, match=r"Masked draws random numbers in eval mode.* encoder"):
        petune.attach(model, method)
    assert not any(hasattr(m, "is_petune_module") for m in model.modules())


def test_a_random_number_without_effect_is_accepted() -> None:
    class Draws(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + 0 * torch.rand(()))

    with pytest.warns(UserWarning, match=r"stay frozen .* inner\.cls, inner\.ca"):  # its class attention
        att = petune.attach(Draws("torch"), "linear")
    assert att.counts.tuned == 0
