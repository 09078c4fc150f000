"""A model that is converted to another number format while an `AdapterBank` holds it, with adapters of any kind."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import petune
from petune.base.errors import UsageError
from tests.fake_plugin import Fake, fake
from tests.several import X, model

__all__ = ["fake"]

NORMED = """
import torch
import petune

class Adapter(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(width)
        self.register_buffer("mask", (torch.rand(width) > 0.5).float())

    def forward(self, x):
        return self.norm(x.flatten(0, -2)).reshape(x.shape) * self.mask

class Normed(petune.Tuner[petune.TunerConfig]):
    identity_at_init = False

    def attach(self, edit):
        for block in edit.sites.require_blocks():
            edit.parallel(block.mlp, block.mlp, Adapter(block.dim))
"""
METHODS = ["normed", "adaptformer", "bitfit", "full", "gps", "houlsby", "lora", "lst", "norm", "prefix", "ssf", "vpt"]
FORMATS = [torch.bfloat16, torch.float16, torch.float64]


def trained(method: str, path: Path, seed: int) -> nn.Module:
    """Save an adapter with random values and statistics, and return its model."""
    torch.manual_seed(seed)
    att = petune.attach(model(), method)
    with torch.no_grad():
        if not att.is_calibrated:
            att.calibrate([(X, torch.zeros(6, dtype=torch.long))])
        for p in att.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        att.train()
        att.model(X)
    att.save(path)
    return att.model.eval()


@pytest.mark.parametrize("in_use", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_follows_the_model(method: str, in_use: bool, tmp_path: Path, fake: Fake) -> None:
    if method == "normed":
        fake("petune-fake-normed", {"normed": "petune_fake_normed:Normed"}, NORMED)
    alone = {name: trained(method, tmp_path / name, seed) for seed, name in enumerate("abc")}
    bank = petune.AdapterBank(model())
    for name in "abc":
        bank.load(name, tmp_path / name)
    for dtype in FORMATS:
        bank.use("a" if in_use else None)
        bank.model.to(dtype)
        with torch.no_grad():
            rows = bank(X[:4].to(dtype), ["a", "b", "c", None])
            for row, (name, built) in enumerate({**alone, None: model()}.items()):
                expected = built.float()(X)
                used = bank.use(name)(X.to(dtype))
                assert used.dtype == rows[row].dtype == dtype
                torch.testing.assert_close(used.float(), expected, atol=0.3, rtol=0.1)
                torch.testing.assert_close(rows[row].float(), expected[row], atol=0.3, rtol=0.1)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_bank_is_not_copied(duplicate: object) -> None:
    with pytest.raises(UsageError, match=r"petune\.AdapterBank\(model\)"):
        duplicate(petune.AdapterBank(model()))  # type: ignore[operator]
