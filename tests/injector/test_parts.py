"""q, k and v of one layer are parts of its output: a verb takes the part alone, or says that it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.injector.test_edit import Custom, Times
from tests.injector.test_forward_verbs import Cell, Twice, attach
from tests.injector.test_looked_into import Keys
from tests.injector.test_verb_order import Matrix
from tests.tiny import X, tiny


class Sum(Matrix):
    """A linear map of a sum."""

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        return (x if isinstance(x, Tensor) else x[0] + 2 * x[1]) @ self.weight.T


@pytest.mark.parametrize("names", ["q", "k", "kv", "vq"])
@torch.no_grad()
def test_parallel_reads_a_part_of_what_leaves_a_layer(names: str) -> None:
    model: Any = tiny()
    own, adapter = copy.deepcopy(model), Sum()

    def change(e: petune.Edit) -> None:
        a, block = e.attention(e.sites.blocks[0]), e.sites.blocks[0]
        sites = [getattr(a, name) for name in names]
        e.parallel(sites if len(sites) > 1 else sites[0], block.attn, adapter, leaving=True)

    attach(model, change)
    block = own.blocks[0]
    parts: dict[str, Tensor] = {}
    block.attn.qkv.register_forward_hook(lambda m, args, y: parts.update(zip("qkv", y.chunk(3, -1), strict=True)))

    def add(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        read = [parts[name] for name in names]
        return y + adapter(read if len(read) > 1 else read[0])

    block.attn.register_forward_hook(add)
    torch.testing.assert_close(model(X), own(X))


REFUSED: dict[str, Callable[[petune.Edit, Any], Any]] = {
    "around": lambda e, a: e.around(a.q, Twice()),
    "side": lambda e, a: e.side([a.q], Cell(1)),
    "train": lambda e, a: e.train(a.v),
    "before": lambda e, a: e.before(a.k, Times(2.0)),
}


@pytest.mark.parametrize("verb", REFUSED)
def test_a_verb_that_takes_a_whole_layer_refuses_a_part(verb: str) -> None:
    model = tiny().requires_grad_(False)
    plain = model(X)
    with pytest.raises(petune.AttachError, match="is a part of what"):
        attach(model, lambda e: REFUSED[verb](e, e.attention(e.sites.blocks[0])))
    assert torch.equal(model(X), plain)


def test_calibration_reads_a_part() -> None:
    class Chooser(Custom):
        def calibrate(self, batches: Any) -> None:
            seen.extend(y.shape[-1] for batch in batches for y in batch.leaving(self.sites))

        def attach(self, edit: petune.Edit) -> None:
            a = edit.attention(edit.sites.blocks[0])
            self.sites = [a.q, a.v]
            edit.after(a.q, Times(1.5))

    seen: list[int] = []
    petune.attach(tiny(), Chooser(lambda e: None)).calibrate([(X, torch.tensor([0, 1]))])
    assert seen == [24, 24]


class Uneven(Keys):
    """Other numbers of keys and of values; the fused attention of PyTorch reads on behind the shorter ones."""

    def __init__(self, keys: tuple[int, int], values: tuple[int, int]) -> None:
        super().__init__()
        self.k, self.v = nn.Parameter(torch.randn(1, *keys)), nn.Parameter(torch.randn(1, *values))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@pytest.mark.parametrize("shapes", [((2, 24), (3, 24)), ((3, 24), (1, 24)), ((0, 24), (0, 24)), ((2, 24), (2, 12)),
                                    ((2, 18), (2, 18))])  # fmt: skip
def test_keys_and_values_must_be_as_many(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    with pytest.raises(petune.AttachError, match="as many keys as values"):
        attach(tiny(), lambda e: e.keys_values(e.sites.blocks[0], Uneven(*shapes)))


def test_linear_layers_are_the_backbones_and_not_those_of_the_same_tuner() -> None:
    found: list[list[str]] = []

    def change(e: petune.Edit) -> None:
        mlp = e.sites.blocks[0].mlp
        e.after(mlp, nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)))
        e.parallel(mlp, mlp, nn.Linear(24, 24))
        found.extend([site.path for site in look(mlp)] for look in (e.linear_layers, e.input_linears))

    attach(tiny(), change)
    assert found == [["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"], ["blocks.0.mlp.fc1"]]


def test_a_site_is_no_block_and_no_site_comes_twice() -> None:
    with pytest.raises(petune.AttachError, match="takes a block"):
        attach(tiny(), lambda e: e.attention(e.sites.blocks[0].attn))  # type: ignore[arg-type]
    with pytest.raises(petune.AttachError, match="one twice"):
        attach(tiny(), lambda e: e.around([e.sites.blocks[0]] * 2, Twice()))


@torch.no_grad()
def test_keys_of_an_adapter_that_is_disabled_do_not_exclude_others() -> None:
    model = tiny()
    plain = model(X)
    outputs, attachments = [], []
    for name in ("a", "b"):
        att = attach(model, lambda e: e.keys_values(e.sites.blocks[0], Keys()), name=name)
        outputs.append(model(X))
        att.disable()
        attachments.append(att)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(model(X), plain)
    attachments[0].enable()
    assert torch.equal(model(X), outputs[0])
    with pytest.raises(petune.AttachError, match="Disable it first"):
        attachments[1].enable()
    for att in attachments:
        att.detach()
    assert torch.equal(model(X), plain)
    assert not any("forward" in vars(m) for m in model.modules())
