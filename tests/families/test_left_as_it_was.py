"""Finding sites, attaching and detaching leave a surveyed model as an untouched copy, fresh and used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from survey.models import FAMILIES, build
from torch import Tensor, nn

import petune
from petune.sites.forward import tensors_in
from tests.sampling import sampled

SAMPLE = {"vision_transformer", "beit", "swin_transformer", "transformers ViT", "transformers DINOv2, registers"}
CASES = sampled(FAMILIES, SAMPLE.__contains__)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return the names of a model's modules, tensors, attributes and hooks."""
    state: dict[str, Any] = {"keys": list(model.state_dict())}
    for path, module in model.named_modules():
        own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        hooks = {name: len(value) for name, value in vars(module).items() if name.endswith("_hooks")}
        state[path] = (type(module), sorted(own), hooks, module.training)
    return state


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return all tensors that a model returns, those of its intermediate layers among them."""
    torch.manual_seed(0)
    with torch.no_grad():
        outputs: list[Any] = [model(x)]
        if hasattr(model, "forward_intermediates"):
            outputs.append(model.forward_intermediates(x))
        inner = next((m for m in model.modules() if hasattr(m, "config") and hasattr(m, "main_input_name")), None)
        if inner is not None:
            outputs.append(inner(x, output_hidden_states=True))
    return list(tensors_in(outputs))


def check_same(model: nn.Module, untouched: nn.Module, x: Tensor) -> None:
    assert state_of(model) == state_of(untouched)
    expected, outputs = outputs_of(untouched, x), outputs_of(model, x)
    assert len(outputs) == len(expected)
    assert all(map(torch.equal, outputs, expected))


@pytest.mark.filterwarnings("ignore:.*Further layers before it count as backbone")
@pytest.mark.parametrize("is_used", sampled([False, True], bool), ids=["fresh", "used"])
@pytest.mark.parametrize("family", CASES)
def test_a_model_is_left_as_it_was(family: str, is_used: bool) -> None:
    model = build(family).eval()
    untouched = copy.deepcopy(model)
    sites = petune.find_sites(model)
    x = torch.randn(2, *sites.input_size, generator=torch.Generator().manual_seed(0))
    if is_used:
        model, untouched = build(family).eval(), build(family).eval()
        for each in (model, untouched):
            outputs_of(each, x)
        petune.find_sites(model)
    petune.attach(model, "norm" if family == "gemma4_vit" else "bitfit").detach()  # gemma4 has no biases
    check_same(model, untouched, x)
