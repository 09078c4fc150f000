"""Adapters that read in one block and add in another, under gradient checkpointing of single blocks."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn

import petune
from petune.injector.hooks.spanning import Spanning
from tests.tiny import X, randomised, tiny

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class Sum(nn.Module):
    """Adds up a map of each input, and passes gradients on to where they were read."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(24, 24) for _ in range(count))

    def forward(self, inputs: Tensor | list[Tensor]) -> Tensor:
        inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        total: Tensor = sum(layer(x.tanh()) for layer, x in zip(self.maps, inputs, strict=True))  # type: ignore
        return total


class Custom(petune.Tuner[petune.TunerConfig]):
    def __init__(self, place: Callable[[petune.Edit, Any], None]) -> None:
        super().__init__()
        self.place = place

    def attach(self, edit: petune.Edit) -> None:
        self.place(edit, edit.sites.blocks)

    def num_parameters(self, sites: petune.Sites) -> int:
        return 1


def two(edit: petune.Edit, blocks: Any) -> None:
    edit.parallel([block.attn for block in blocks[:2]], blocks[2].attn, Sum(2))
    edit.parallel(blocks[0], blocks[2].mlp, Sum(1))


CASES: dict[str, Any] = {
    "lst": "lst",
    "what enters the blocks": Custom(lambda edit, blocks: edit.parallel(blocks, blocks[-1], Sum(3))),
    "inside blocks": Custom(lambda edit, blocks: edit.parallel([b.mid for b in blocks], blocks[-1].mlp, Sum(3))),
    "one site": Custom(lambda edit, blocks: edit.parallel(blocks[0].mid, blocks[2].mlp, Sum(1))),
    "behind the blocks": Custom(lambda edit, blocks: edit.parallel(blocks[0].attn, edit.sites.parts["norm"], Sum(1))),
    "into a block": Custom(lambda edit, blocks: edit.parallel(blocks[1], blocks[1].mlp, Sum(1))),
    "two": Custom(two),
}


def attached(case: str) -> petune.Attachment:
    att = randomised(petune.attach(tiny(depth=3), CASES[case]))
    att.train()
    return att


def gradients(att: petune.Attachment) -> list[Tensor]:
    """Return gradients of several forwards whose backwards come later, in another order, one of them twice."""
    model, values = att.model, att.parameters()
    first = model(X).square().sum()
    second = model(2 * X).square().sum()
    both = model(3 * X).sum() + model(X).sum()
    backwards = [(first, True), (second, False), (both, False), (first, False)]
    return [g for loss, again in backwards for g in torch.autograd.grad(loss, values, retain_graph=again)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_and_nothing_stays_in_memory(case: str) -> None:
    att = attached(case)
    model: Any = att.model
    expected = gradients(att)
    model.set_grad_checkpointing(True)
    assert all(torch.equal(g, e) for g, e in zip(gradients(att), expected, strict=True))
    gc.collect()
    holders = [m for m in model.modules() if isinstance(m, Spanning)]
    assert holders
    assert not any(reference() for holder in holders for reference in holder.records.records)
    assert not any(holder.entered for holder in holders)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_between_forward_and_backward_is_independent(duplicate: Any) -> None:
    att = attached("inside blocks")
    model: Any = att.model
    model.set_grad_checkpointing(True)
    loss = model(X).sum()
    twin = duplicate(model)
    loss.backward()
    twin(X).sum().backward()
    own, other = (dict(m.named_parameters()) for m in (model, twin))
    assert all(torch.equal(p.grad, other[key].grad) for key, p in own.items() if p.grad is not None)


@pytest.mark.parametrize("case", ["lst", "inside blocks", "one site", "into a block"])
def test_reentrant_checkpointing_is_refused(case: str) -> None:
    att = attached(case)
    model: Any = att.model
    model.set_grad_checkpointing(True)
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(True)
    try:
        loss = model(X.clone().requires_grad_()).sum()
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            loss.backward()
    finally:
        timm.layers.set_reentrant_ckpt(before)


@pytest.mark.parametrize("case", CASES)
def test_transformers_checkpointing(case: str) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=4, **shape))
    att = randomised(petune.attach(model, CASES[case]))
    att.train()
    values = att.parameters()

    def slopes() -> tuple[Tensor, ...]:
        first, _ = model(X).logits.square().sum(), model(2 * X).logits.sum()
        return torch.autograd.grad(first, values)

    expected = slopes()
    model.activation_checkpointing_enable()
    assert all(torch.equal(g, e) for g, e in zip(slopes(), expected, strict=True))


@pytest.mark.exhaustive
def test_compiled_without_a_graph_break() -> None:
    att = attached("lst")
    expected = att.model(X)
    torch.compiler.reset()
    compiled = torch.compile(att.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected, atol=1e-6, rtol=1e-5)
