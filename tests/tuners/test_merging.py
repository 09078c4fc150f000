"""Merging a method into the weights: the model computes the same, or the method says why it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import NotMergeable
from petune.plugin_dev.tiny_models import tiny_models, tiny_timm
from tests.tuned import D, X, attached


@pytest.mark.filterwarnings("ignore:ssf leaves .* layers as they are")
@pytest.mark.parametrize("library", sorted(tiny_models()))
@pytest.mark.parametrize("method", ["bitfit", "fact", "fact:form=tk", "norm", "partial", "repadapter", "ssf"])
def test_merged_models_compute_the_same(library: str, method: str) -> None:
    base = tiny_models()[library]()
    torch.manual_seed(0)
    att = petune.attach(base, method)
    for p in att.tuned.values():
        nn.init.normal_(p, mean=float(p.detach().mean()), std=0.1)
    keys = list(tiny_models()[library]().state_dict())
    with torch.no_grad():
        before = logits(att.model.eval())
        if library == "torchvision" and method == "repadapter":  # its qkv is no Linear layer
            with pytest.raises(NotMergeable, match="no linear layer reads"):
                att.merge()
            assert torch.equal(logits(att.model), before)
            return
        att.merge()
        torch.testing.assert_close(logits(att.model), before, atol=1e-5, rtol=1e-5)
    assert list(att.model.state_dict()) == keys
    assert not att.attached


def logits(model: nn.Module) -> Tensor:
    out = model(X)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("method", ["adaptformer", "vpt", "houlsby", "lst", "convpass"])
def test_methods_that_cannot_be_merged_say_why(method: str) -> None:
    att = attached(method)
    with torch.no_grad():
        before = att.model(X)
        with pytest.raises(NotMergeable, match="weights"):
            att.merge()
        assert torch.equal(att.model(X), before)


@pytest.mark.parametrize(("factor", "dtype"), [(3, torch.float32), (2.2, torch.float32), (2.2, torch.float64)])
def test_a_wrong_merge_is_detected_and_undone(factor: float, dtype: torch.dtype) -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((D,), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

        def merge(self, module: nn.Module) -> None:
            module.fc2.weight.data.mul_(factor)
            module.fc2.bias.data.mul_(factor)

    class Tuner(petune.Tuner[petune.TunerConfig]):
        def attach(self, edit: petune.Edit) -> None:
            for block in edit.sites.blocks:
                edit.after(block.mlp, Wrong())

    att = petune.attach(tiny_timm().to(dtype), Tuner())
    with torch.no_grad():
        before = att.model(X.to(dtype))
        with pytest.raises(NotMergeable, match="computes something else"):
            att.merge()
        assert torch.equal(att.model(X.to(dtype)), before)
