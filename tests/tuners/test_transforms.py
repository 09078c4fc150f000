"""Attached models under torch.compile, torch.export, gradient checkpointing, copies, pickle and exceptions."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.sampling import sampled
from tests.tiny import X, randomised, tiny

CASES = [("adaptformer", {}), ("vpt", {"num_prompts": 3}), ("vpt", {"num_prompts": 3, "deep": False})]
IDS = ["adaptformer", "vpt-deep", "vpt-shallow"]


def attached(method: str, options: dict[str, object]) -> petune.Attachment:
    return randomised(petune.attach(tiny(), method, **options))


@pytest.fixture
def images() -> Tensor:
    return X


def gradients(att: petune.Attachment, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    for p in att.parameters():
        p.grad = None
    model(x).square().sum().backward()
    return {key: p.grad.clone() for key, p in {**att.tuned, **att.head}.items() if p.grad is not None}


def assert_same_gradients(
    att: petune.Attachment, found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    assert set(found) == set(expected) == {*att.tuned, *att.head}
    for key, slope in expected.items():
        torch.testing.assert_close(found[key], slope, atol=tolerance, rtol=tolerance)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_compiled_without_a_graph_break(method: str, options: dict[str, object], images: Tensor) -> None:
    att = attached(method, options)
    expected, slopes = att.model(images), gradients(att, att.model, images)
    torch.compiler.reset()
    # aot_eager traces forward and backward as inductor does, and needs no C++ compiler
    compiled = torch.compile(att.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, atol=1e-6, rtol=1e-5)
    again = gradients(att, compiled, images)
    assert_same_gradients(att, again, slopes, 1e-4)


@pytest.mark.parametrize(("method", "options"), sampled(CASES, lambda case: case[0] == "adaptformer"), ids=IDS)
def test_exported_with_a_free_batch_size(method: str, options: dict[str, object], images: Tensor) -> None:
    att = attached(method, options)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(att.model, (images,), dynamic_shapes=({0: batch},)).module()
    more = torch.cat([images, -images, images.flip(3)])
    torch.testing.assert_close(exported(more), att.model(more), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_gradient_checkpointing_gives_the_same_gradients(
    method: str, options: dict[str, object], images: Tensor
) -> None:
    att = attached(method, options)
    att.train()
    torch.manual_seed(3)  # AdaptFormer's dropout draws from the global generator, which checkpointing restores
    expected = gradients(att, att.model, images)
    att.model.set_grad_checkpointing(True)
    torch.manual_seed(3)
    again = gradients(att, att.model, images)
    assert_same_gradients(att, again, expected, 1e-5)


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_a_copy_has_adapters_of_its_own(method: str, options: dict[str, object], images: Tensor) -> None:
    att = attached(method, options)
    expected = att.model(images)
    twin = copy.deepcopy(att.model)
    with torch.no_grad():
        for p in att.tuned.values():
            p.zero_()
    assert torch.equal(twin(images), expected)
    assert not torch.equal(att.model(images), expected)
    twin.train()
    assert twin.training
    assert not twin.blocks[0].training
    assert twin.head.training


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_a_pickled_model_computes_the_same(method: str, options: dict[str, object], images: Tensor) -> None:
    att = attached(method, options)
    again = pickle.loads(pickle.dumps(att.model))
    assert torch.equal(again(images), att.model(images))
    buffer = io.BytesIO()
    torch.save(att.model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(images), att.model(images))


def test_an_exception_between_enter_and_exit_leaves_nothing_behind(images: Tensor) -> None:
    att = attached("adaptformer", {})
    expected = att.model(images)

    def fail(*_: object) -> None:
        raise ValueError("in the MLP")

    handle = att.model.blocks[1].mlp.fc1.register_forward_hook(fail)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that an always_call hook saw the exception
        with pytest.raises(ValueError, match="in the MLP"):
            att.model(torch.randn(3, 3, 16, 16))
    handle.remove()
    entered = [m.entered for m in att.model.modules() if hasattr(m, "entered")]
    assert entered == [None] * 2
    assert torch.equal(att.model(images), expected)


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_half_precision_follows_the_model(method: str, options: dict[str, object], images: Tensor) -> None:
    att = attached(method, options)
    expected = att.model(images)
    half = att.model.to(torch.bfloat16)(images.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.5, rtol=0.1)
