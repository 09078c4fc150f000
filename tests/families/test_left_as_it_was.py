"""Finding sites, attaching and detaching leave a surveyed model as an untouched copy, fresh and used."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from survey.models import FAMILIES, build, example_of
from survey.snapshot import differences, snapshot
from torch import Tensor, nn

import petune
from petune.sites.forward import tensors_in
from petune.sites.input_spec import Inputs
from tests.sampling import sampled

SAMPLE = {"vision_transformer", "beit", "swin_transformer", "transformers ViT", "transformers DINOv2, registers"}
CASES = sampled(FAMILIES, SAMPLE.__contains__)
WITHOUT_BIASES = ("gemma4_vit", "transformers Pixtral, tower")


def outputs_of(model: nn.Module, x: Inputs) -> list[Tensor]:
    """Return all tensors that a model returns, those of its intermediate layers among them."""
    torch.manual_seed(0)
    with torch.no_grad():
        outputs: list[Any] = [x.call(model)]
        if hasattr(model, "forward_intermediates"):
            outputs.append(model.forward_intermediates(*x.args))
        inner = next((m for m in model.modules() if hasattr(m, "config") and hasattr(m, "main_input_name")), None)
        if inner is not None:
            with contextlib.suppress(TypeError):  # a forward that returns no hidden states
                outputs.append(Inputs(x.args, {**x.kwargs, "output_hidden_states": True}).call(inner))
    return list(tensors_in(outputs))


def differences_of(outputs: list[Tensor], expected: list[Tensor]) -> list[int]:
    """Return the positions of tensors that differ."""
    assert len(outputs) == len(expected)
    pairs = zip(outputs, expected, strict=True)
    return [i for i, (x, y) in enumerate(pairs) if not torch.equal(x.nan_to_num(), y.nan_to_num())]


@pytest.mark.filterwarnings("ignore:.*Further layers that the predictions depend on")
@pytest.mark.parametrize("is_used", sampled([False, True], bool), ids=["fresh", "used"])
@pytest.mark.parametrize("family", CASES)
def test_a_model_is_left_as_it_was(family: str, is_used: bool) -> None:
    """Every attribute of every module is the same object with the same contents: hooks, flags, modes, buffers."""
    model = build(family).eval()
    example = example_of(family)
    sites = petune.find_sites(copy.deepcopy(model), example=example)
    x = sites.input_spec.noise(2)
    untouched = copy.deepcopy(model)
    for each in (model, untouched) if is_used else ():
        outputs_of(each, x)
    before = snapshot(model)
    petune.find_sites(model, example=example)
    method = "norm" if family in WITHOUT_BIASES else "bitfit"
    petune.attach(model, method, example=example, train_head="head" in sites.parts).detach()
    changed = [line for line in differences(before, snapshot(model)) if "_cache" not in line.partition(": ")[0]]
    assert not changed  # but for copies of weights that LeViT keeps, which may have been trained
    assert not differences_of(outputs_of(model, x), outputs_of(untouched, x))


LARGE = ("deepseek_vit", "gemma4_vit")
METHODS = ["adaptformer", "vpt", "vpt:deep=false", "lora", "lst", "ssf", "full"]


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*reads the weights of layers in its blocks")
@pytest.mark.filterwarnings("ignore:.*Further layers that the predictions depend on")
@pytest.mark.filterwarnings("ignore:.* as they are: ")  # attentions, MLPs and norms in no block
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in LARGE])
def test_with_a_method_a_model_returns_as_many_tensors_of_the_same_shapes(family: str, method: str) -> None:
    """Hidden states and intermediate features among them; a copy returns the same; disabled and detached, as before."""
    model = build(family).eval()
    example = example_of(family)
    sites = petune.find_sites(model, example=example)
    x = sites.input_spec.noise(2)
    expected = outputs_of(copy.deepcopy(model), x)
    try:
        att = petune.attach(model, method, example=example, train_head="head" in sites.parts)
    except petune.PetuneError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        for parameter in att.parameters():
            parameter += torch.randn_like(parameter) * 0.05
    outputs = outputs_of(model, x)
    if method != "lst":  # its own output
        assert [tensor.shape for tensor in outputs] == [tensor.shape for tensor in expected]
    assert not differences_of(outputs_of(copy.deepcopy(model), x), outputs)
    with att.disabled():
        assert not differences_of(outputs_of(model, x), expected)
    att.detach()
    assert not differences_of(outputs_of(model, x), expected)
