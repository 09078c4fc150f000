"""Several adapters at one site act in the order in which they were declared, and merge to the same; re-entry."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.injector.test_edit import Add, Custom, Times
from tests.tiny import X, tiny


def block_input() -> Tensor:
    return torch.randn(2, 17, 24, generator=torch.Generator().manual_seed(3))


class Matrix(nn.Module):
    """A linear map, for `parallel`."""

    def __init__(self, num_outputs: int = 24) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_outputs, 24, generator=torch.Generator().manual_seed(4)) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def attach(model: nn.Module, verbs: list[tuple[str, nn.Module]], name: str = "custom") -> petune.Attachment:
    def change(edit: petune.Edit) -> None:
        site = edit.sites.blocks[0].mlp
        for verb, adapter in verbs:
            edit.parallel(site, site, adapter) if verb == "parallel" else getattr(edit, verb)(site, adapter)

    return petune.attach(model, Custom(change), name=name, train_head=False)


def expected(mlp: Callable[[Tensor], Tensor], verbs: list[tuple[str, nn.Module]], x: Tensor) -> Tensor:
    """What one reads in the declarations: each adapter sees what those before it have made of input and output."""
    changes: list[Callable[[Tensor], Tensor]] = []
    for verb, adapter in verbs:
        if verb == "before":
            x = adapter(x)
        elif verb == "parallel":
            changes.append(functools.partial(torch.add, adapter(x)))
        else:
            changes.append(adapter)
    y = mlp(x)
    for change in changes:
        y = change(y)
    return y


VERBS = ("before", "after", "parallel")
ORDERS = list(itertools.product(VERBS, repeat=3))
KINDS = [pytest.param(kinds, marks=() if len(set(kinds)) == 3 else pytest.mark.exhaustive) for kinds in ORDERS]
IDS = ["-".join(kinds) for kinds in ORDERS]


@pytest.mark.parametrize("two_attachments", [False, True])
@pytest.mark.parametrize("with_prompts", [False, True])
@pytest.mark.parametrize("kinds", KINDS, ids=IDS)
@torch.no_grad()
def test_adapters_act_in_the_order_of_declaration(
    kinds: tuple[str, ...], with_prompts: bool, two_attachments: bool
) -> None:
    model = tiny()
    verbs = [(verb, Matrix() if verb == "parallel" else kind(2.0 + i)) for i, (verb, kind) in enumerate(
        zip(kinds, (Add, Times, Add), strict=True)
    )]  # fmt: skip
    plain = expected(model.blocks[0].mlp, verbs, block_input())
    mlp = model.blocks[0].mlp
    seen: list[Tensor] = []
    mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    if with_prompts:
        petune.attach(model, "vpt", train_head=False)
    if two_attachments:
        attach(model, verbs[:1], "first")
        attach(model, verbs[1:], "second")
    else:
        attach(model, verbs)
    torch.testing.assert_close(mlp(block_input()), plain)
    torch.testing.assert_close(seen[-1], plain)  # a hook of the user's sees the result


def test_at_a_block_with_prompts_adapters_act_in_order_too() -> None:
    model = tiny()

    def change(edit: petune.Edit) -> None:
        edit.after(edit.sites.blocks[-1], Add(1.0))
        edit.after(edit.sites.blocks[-1], Times(2.0))

    seen: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        petune.attach(model, "vpt", train_head=False)
        model(X)
        plain = seen[-1]
        petune.attach(model, Custom(change), train_head=False)
        model(X)
    torch.testing.assert_close(seen[-1], (plain + 1) * 2)


class Scale(Times):
    """x · number, which merges into a linear layer whose output or input it is."""

    def __init__(self, value: float, verb: str) -> None:
        super().__init__(value)
        self.verb = verb

    @torch.no_grad()
    def merge(self, layer: nn.Module) -> None:
        layer.weight.mul_(self.value)
        if self.verb == "after":
            layer.bias.mul_(self.value)


class Shift(Add):
    """x + number, which merges too."""

    def __init__(self, value: float, verb: str) -> None:
        super().__init__(value)
        self.verb = verb

    @torch.no_grad()
    def merge(self, layer: nn.Module) -> None:
        shift = layer.weight.sum(1) * self.value if self.verb == "before" else self.value
        layer.bias.add_(shift)


class Delta(Matrix):
    """A change of the weight, which merges."""

    @torch.no_grad()
    def merge(self, layer: nn.Module) -> None:
        layer.weight.add_(self.weight)


def merging(verb: str, index: int, num_outputs: int) -> nn.Module:
    if verb == "parallel":
        return Delta(num_outputs)
    return Shift(0.5, verb) if index % 2 == 0 else Scale(1.5, verb)


@pytest.mark.parametrize("kinds", KINDS, ids=IDS)
@torch.no_grad()
def test_merged_they_compute_the_same(kinds: tuple[str, ...]) -> None:
    model = tiny()
    layer = model.blocks[0].mlp.fc1

    def change(edit: petune.Edit) -> None:
        site = edit.site(layer)
        for index, verb in enumerate(kinds):
            adapter = merging(verb, index, layer.out_features)
            edit.parallel(site, site, adapter) if verb == "parallel" else getattr(edit, verb)(site, adapter)

    att = petune.attach(model, Custom(change), train_head=False)
    together = model(X)
    att.merge()
    torch.testing.assert_close(model(X), together, atol=1e-4, rtol=1e-4)


def test_what_no_weight_computes_is_not_merged() -> None:
    model = tiny()
    verbs = [("parallel", Delta(24)), ("after", Scale(2.0, "after")), ("before", Scale(3.0, "before"))]
    att = attach(model, [*verbs, ("parallel", Delta(24))])
    together = model(X)
    with pytest.raises(petune.NotMergeable):
        att.merge()
    assert torch.equal(model(X), together)


@torch.no_grad()
def test_attachments_merge_in_the_order_of_attaching() -> None:
    model = tiny()
    layer = model.blocks[0].mlp.fc1
    attachments = []
    for index in range(3):

        def change(edit: petune.Edit, index: int = index) -> None:
            edit.after(edit.site(layer), merging("after", index, 96))

        attachments.append(petune.attach(model, Custom(change), name=f"number{index}", train_head=False))
    together = model(X)
    for att in attachments:
        att.merge()
        torch.testing.assert_close(model(X), together, atol=1e-4, rtol=1e-4)


class Calls(nn.Module):
    """number · module(x), of a module of the backbone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = (module,)
        self.value = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.value * self.module[0](x)


@pytest.mark.parametrize("verb", VERBS)
@torch.no_grad()
def test_an_adapter_that_calls_its_own_site_calls_it_without_itself(verb: str) -> None:
    model, x = tiny(), block_input()
    mlp = model.blocks[0].mlp
    own = copy.deepcopy(mlp)
    att = attach(model, [(verb, Calls(mlp))])
    once = expected(own, [(verb, Calls(own))], x)
    torch.testing.assert_close(mlp(x), once)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied.blocks[0].mlp(x), once)
    att.detach()
    torch.testing.assert_close(mlp(x), own(x))


@torch.no_grad()
def test_an_adapter_that_calls_a_module_runs_the_other_adapters_there() -> None:
    model, x = tiny(), block_input()
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    own = copy.deepcopy(mlp)

    def change(edit: petune.Edit) -> None:
        edit.after(edit.sites.blocks[0].mlp, Add(1.0))
        edit.after(edit.sites.blocks[0].attn, Calls(mlp))

    plain = attn(x)
    petune.attach(model, Custom(change), train_head=False)
    torch.testing.assert_close(attn(x), 0.5 * (own(plain) + 1))


@torch.no_grad()
def test_adapters_that_call_each_other_end() -> None:
    model, x = tiny(), block_input()
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    a, m = copy.deepcopy(attn), copy.deepcopy(mlp)

    def change(edit: petune.Edit) -> None:
        edit.after(edit.sites.blocks[0].mlp, Calls(attn))
        edit.after(edit.sites.blocks[0].attn, Calls(mlp))

    petune.attach(model, Custom(change), train_head=False)
    torch.testing.assert_close(attn(x), 0.5 * (0.5 * a(m(a(x)))))


@torch.no_grad()
def test_an_adapter_that_fails_acts_again_in_the_next_forward() -> None:
    model, x = tiny(), block_input()
    adapter = Times(2.0)
    attach(model, [("after", adapter)])
    whole = model.blocks[0].mlp(x)
    forward = adapter.forward
    adapter.forward = lambda x: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        model.blocks[0].mlp(x)
    adapter.forward = forward  # type: ignore[method-assign]
    torch.testing.assert_close(model.blocks[0].mlp(x), whole)


@torch.no_grad()
def test_compiled_and_exported_an_adapter_that_calls_its_site_computes_the_same() -> None:
    model = tiny()
    attach(model, [("after", Calls(model.blocks[0].mlp))])
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), model(X))


@pytest.mark.parametrize("prompts_first", [True, False])
def test_an_adapter_at_the_entry_of_a_block_with_prompts_cannot_call_that_block(prompts_first: bool) -> None:
    model = tiny()
    block = model.blocks[0]

    def change(edit: petune.Edit) -> None:
        edit.before(edit.sites.blocks[0], Calls(block))

    def calling() -> petune.Attachment:
        return petune.attach(model, Custom(change), train_head=False)

    def prompts() -> petune.Attachment:
        return petune.attach(model, "vpt", train_head=False)

    with torch.no_grad():
        kept = prompts() if prompts_first else calling()
        before = model(X)
        with pytest.raises(petune.AttachError, match=r"where Block is entered calls that module"):
            calling() if prompts_first else prompts()
        assert torch.equal(model(X), before)
        kept.detach()
        assert torch.equal(model(X), tiny()(X))
