"""ViTs whose structure differs from the usual: every site is right or missing, and adapters add where they say."""

from __future__ import annotations

import pytest
import torch
from survey.pairs import examine
from survey.residual_stream import unproven_mids
from torch import nn

import petune
from tests.sampling import sampled
from tests.tiny import module_beside

models = module_beside(__file__, "uncommon_structures")

FIRST_BLOCK = {
    "summed branches": {"attn": "0", "mlp": "1", "mid": "input of 1"},
    "several lanes": {"attn": "0", "mlp": "1", "norm1": "0.norm", "norm2": "1.0"},
    "normalized weights": {"attn": "0", "mlp": "1"},
    "scaled stream": {"attn": "0", "mlp": "1", "norm1": "0.norm", "norm2": "trunk.norms.0", "mid": "input of 1"},
    "triple": {"attn": "trunk.2.fn", "mlp": "trunk.3.fn", "norm1": "trunk.2.fn.norm", "norm2": "trunk.3.fn.0",
               "mid": "input of trunk.3.fn"},
    "maps": {"attn": "0", "mlp": "1", "norm1": "0.norm", "norm2": "1.0", "mid": "input of 1"},
    "wide class token": {"attn": "0", "mlp": "1", "norm1": "0.norm", "norm2": "1.0", "mid": "input of 1"},
    "two norms": {"attn": "0", "mlp": "1", "mid": "input of 1"},
}  # fmt: skip
"""The sites of the first block, without the path of its list."""


def test_the_sites_are_those_of_the_formula() -> None:
    for name, expected in FIRST_BLOCK.items():
        model = models.build(name)
        sites = petune.find_sites(model)
        parts = {role: site.where.replace("trunk.layers.0.", "") for role, site in sites.blocks[0].parts.items()}
        assert parts == expected, name
        assert (len(sites.blocks), sites.head.path) == (2, "head"), name
        assert sites.parts.keys() >= {"norm"} or name == "normalized weights"
        assert unproven_mids(model, sites) == [], name


METHODS = ["adaptformer:bottleneck=4", "lora", "houlsby", "bitfit", "norm", "vpt"]
REFUSED = {
    ("several lanes", "adaptformer"): "has no site 'mid'",
    ("normalized weights", "adaptformer"): "has no site 'mid'",
    ("normalized weights", "norm"): "found nothing to train",
    ("triple", "vpt"): "cannot take prompts",
    ("maps", "vpt"): "lays its tokens out as an image",
}


@pytest.mark.parametrize("name", sampled(models.STRUCTURES, lambda name: name in {"summed branches", "triple"}))
@pytest.mark.parametrize("method", sampled(METHODS, "adaptformer:bottleneck=4".__eq__))
def test_every_method_works_or_is_refused(name: str, method: str) -> None:
    outcome = examine(models.build(name), method)
    reason = REFUSED.get((name, method.partition(":")[0]))
    assert outcome.state == ("refused" if reason else "ok"), outcome.detail
    assert reason is None or reason in outcome.detail


def test_all_summed_branches_get_lora() -> None:
    att = petune.attach(models.build("summed branches"), "lora")
    assert len(att.tuned) == 2 * 2 * (2 + 2) * 2  # A and B, blocks, layers of two attentions and of two MLPs


def test_norms_of_maps_and_of_functions_train() -> None:
    model = models.build("maps")
    att = petune.attach(model, "norm")
    norms = [m for m in model.modules() if isinstance(m, models.ChannelNorm | models.PlainNorm)]
    assert att.counts.tuned == sum(p.numel() for m in norms for p in m.parameters()) == 4 * 2 * 24 + 24


def test_an_adapter_beside_a_scaled_stream_adds_to_the_mlp() -> None:
    model = models.build("scaled stream")
    att = petune.attach(model, "adaptformer", bottleneck=4, blocks=[1])
    adapter = next(m.adapter for m in model.modules() if hasattr(m, "is_petune_module") and hasattr(m, "adapter"))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    trunk, x = model.trunk, torch.randn(2, 16, 24)
    with torch.no_grad():
        output = trunk(x)
        with att.disabled():
            for branch, norm in zip([*trunk.layers[0], trunk.layers[1][0]], trunk.norms, strict=False):
                x = norm(branch(x) + x * 2)
            expected = trunk.norms[3](trunk.layers[1][1](x) + adapter(x) + x * 2)
    torch.testing.assert_close(output, expected)
