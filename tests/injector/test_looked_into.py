"""A model is looked into as it is without adapters that bring keys, run a part of it twice, or read several sites."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.plugin_dev.tiny_models import tiny_models
from tests.injector.test_around_others import Both, Tokens
from tests.injector.test_edit import Add
from tests.injector.test_forward_verbs import Never, Twice, attach, run
from tests.injector.test_verb_order import Matrix
from tests.tiny import X, tiny

LIBRARIES = tiny_models()


class Keys(nn.Module):
    """Three keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Parameter(torch.randn(2, 1, 3, 24, generator=torch.Generator().manual_seed(6)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.pair[0], self.pair[1]


class NoGradients(Twice):
    """A first pass that trains nothing, as L2P has."""

    def forward(self, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.no_grad():
            first = inner(x)
        return self.value * first + inner(x)


OTHERS: dict[str, Callable[[petune.Edit], Any]] = {
    "keys": lambda e: e.keys_values(e.sites.blocks[0], Keys()),
    "around": lambda e: e.around(e.sites.blocks[0], Twice()),
    "first pass": lambda e: e.around(e.sites.blocks, NoGradients()),
    "several": lambda e: e.parallel([e.sites.blocks[0], e.sites.blocks[1].attn], e.sites.blocks[1], Both()),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_an_attention_is_found_whatever_is_attached(library: str, other: str) -> None:
    model, found = LIBRARIES[library](), []

    def look(e: petune.Edit) -> None:
        a = e.attention(e.sites.blocks[0])
        parts = [None if site is None else (site.path, site.part, site.dim) for site in (a.q, a.k, a.v)]
        found.append((*parts, a.num_heads, a.num_kv_heads, a.head_dim, a.v_head_dim, a.scale))
        e.after(e.sites.norm, Add(1.0))

    attach(model, look, name="before")
    attach(model, OTHERS[other], name="other")
    attach(model, look, name="after")
    assert found[0] == found[1]


@pytest.mark.parametrize("other", OTHERS)
@torch.no_grad()
def test_prompts_do_not_depend_on_the_order_of_attaching(other: str) -> None:
    outputs = []
    for names in (("prompts", "other"), ("other", "prompts")):
        model = tiny()
        verbs = OTHERS | {"prompts": lambda e: e.prompt(e.sites.blocks, Tokens())}
        for name in names:
            attach(model, verbs[other if name == "other" else name], name=name)
        outputs.append(run(model))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("library", LIBRARIES)
def test_keys_of_two_adapters_in_one_attention_are_refused(library: str) -> None:
    model = LIBRARIES[library]()
    attach(model, OTHERS["keys"], name="a")
    attach(model, lambda e: e.around(e.sites.blocks[0].attn, Twice()), name="around")
    before = run(copy.deepcopy(model))
    with pytest.raises(petune.AttachError, match="keys and values of another adapter"):
        attach(model, OTHERS["keys"], name="b")
    assert torch.equal(run(model), before)


def test_a_method_is_checked_again_among_other_adapters() -> None:
    model = tiny()

    def read(e: petune.Edit) -> None:
        e.parallel(e.sites.blocks[0].mlp, e.sites.blocks[0], Matrix())

    attach(model, read, name="a").detach()
    attach(model, lambda e: e.around(e.sites.blocks[0].mlp, Never()), name="never")
    expected = model(X)
    with pytest.raises(petune.AttachError, match="may leave it out"):
        attach(model, read, name="a")
    assert torch.equal(model(X), expected)
