"""transformers' Conv1D, a linear layer that holds its weight transposed, is edited and merged as nn.Linear is."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import petune
from tests.tiny import tiny


def transposed(model: nn.Module) -> nn.Module:
    """Replace the linear layers of the blocks by Conv1D with the same weights."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "blocks" in path:
            other = Conv1D(layer.out_features, layer.in_features)
            other.load_state_dict({"weight": layer.weight.detach().T, "bias": layer.bias})
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, other)
    return model


def test_every_method_for_linear_layers_edits_and_merges_it() -> None:
    plain, model = tiny().eval(), transposed(tiny()).eval()
    x = torch.randn(2, *petune.find_sites(model).input_size)
    for method in ("lora", "dora", "fact", "ssf"):
        expected = petune.attach(plain, method)
        att = petune.attach(model, method)
        assert {tuple(t.shape) for t in att.tuned.values()} == {tuple(t.shape) for t in expected.tuned.values()}, method
        assert att.counts.tuned == expected.counts.tuned, method
        with torch.no_grad():
            for mine, other in zip(att.tuned.values(), expected.tuned.values(), strict=True):
                other.copy_(mine.normal_(std=0.1))
            output = model(x)
            torch.testing.assert_close(output, plain(x), atol=1e-4, rtol=1e-4)
            att.merge()
            torch.testing.assert_close(model(x), output, atol=1e-4, rtol=1e-4)
        expected.detach()
        model = transposed(tiny()).eval()
