"""The verbs that change the forward between modules, around them, and beside them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.injector.hooks.base import tensor_of
from petune.plugin_dev.tiny_models import tiny_models
from petune.sites.logits import logits_of
from tests.injector.test_edit import Add, Custom, Times
from tests.injector.test_verb_order import Matrix, block_input
from tests.sites import branching_blocks
from tests.tiny import X, tiny

LIBRARIES = tiny_models()


def attach(model: nn.Module, change: Callable[[petune.Edit], Any], **options: Any) -> petune.Attachment:
    return petune.attach(model, Custom(lambda edit: change(edit) and None), train_head=False, **options)


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    return logits_of(model(x))


def frozen(library: str) -> nn.Module:
    """A model whose weights are frozen already: torch multiplies those by another kernel."""
    return LIBRARIES[library]().requires_grad_(False)


class Twice(nn.Module):
    """A part of what the site makes of x, and of what it makes of 2 x."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.5))

    def forward(self, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.value * inner(x) + inner(2 * x)


class Cell(nn.Module):
    """A state that grows from site to site; it changes all sites but the first."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(24, 24) for _ in range(count))

    def forward(self, state: Tensor | None, x: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        state = self.maps[index](x) if state is None else state.tanh() + self.maps[index](x)
        return state, state if index else None


VERBS: dict[str, Callable[[petune.Edit], Any]] = {
    "stream": lambda edit: [edit.stream(block.mid, Times(1.5)) for block in edit.sites.blocks],
    "around an MLP": lambda edit: edit.around(edit.sites.blocks[1].mlp, Twice()),
    "around norm and MLP": lambda edit: edit.around([edit.sites.blocks[1].norm2, edit.sites.blocks[1].mlp], Twice()),
    "around an attention": lambda edit: edit.around(edit.sites.blocks[0].attn, Twice()),
    "around blocks and norm": lambda edit: edit.around([*edit.sites.blocks, edit.sites.norm], Twice()),
    "side": lambda edit: edit.side(edit.sites.blocks, Cell(2), leaving=True),
    "parallel": lambda edit: edit.parallel(edit.sites.blocks[0].attn, edit.sites.blocks[1], Matrix(), leaving=True),
}


def residual(block: Any, x: Tensor, *, stream: float = 1.0, mlp: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    x = (x + block.attn(block.norm1(x))) * stream
    return x + (mlp or block.mlp)(block.norm2(x))


def written_out(verb: str, model: Any, att: petune.Attachment) -> Tensor:
    """What a verb does to timm's ViT, written out."""
    x = model._pos_embed(model.patch_embed(X))
    first, second = model.blocks
    if verb == "stream":
        x = residual(second, residual(first, x, stream=1.5), stream=1.5)
    elif verb == "around an MLP":
        x = residual(second, residual(first, x), mlp=lambda x: 0.5 * second.mlp(x) + second.mlp(2 * x))
    elif verb == "around norm and MLP":
        x = first(x)
        x = x + second.attn(second.norm1(x))
        x = x + 0.5 * second.mlp(second.norm2(x)) + second.mlp(second.norm2(2 * x))
    elif verb == "around an attention":
        y = first.norm1(x)
        x = x + 0.5 * first.attn(y) + first.attn(2 * y)
        x = second(x + first.mlp(first.norm2(x)))
    elif verb == "around blocks and norm":
        return model.head((0.5 * model.norm(model.blocks(x)) + model.norm(model.blocks(2 * x)))[:, 0])
    elif verb == "side":
        maps = att.edit_log.placed[0].holder.adapter.maps  # type: ignore[union-attr]
        x = first(x)
        state, x = maps[0](x), second(x)  # type: ignore[index,operator]
        x = x + state.tanh() + maps[1](x)  # type: ignore[index,operator]
    else:
        read = first.attn(first.norm1(x))
        x = second(first(x)) + att.edit_log.placed[0].holder.adapter(read)  # type: ignore[operator]
    return model.head(model.norm(x)[:, 0])


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_computes_what_it_says(verb: str) -> None:
    att = attach(tiny(), VERBS[verb])
    plain = written_out(verb, tiny(), att)
    torch.testing.assert_close(run(att.model), plain)
    tuned = list(att.tuned.values())
    expected = torch.autograd.grad(plain.square().sum(), tuned, allow_unused=True)
    if verb in ("side", "parallel"):  # the adapters themselves are in the written-out formula
        torch.testing.assert_close(torch.autograd.grad(run(att.model).square().sum(), tuned), expected)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_verb_is_exactly_undone_and_copied_in_every_library(library: str, verb: str) -> None:
    model = frozen(library)
    before = [(path, {*vars(m)}, len(m._forward_hooks)) for path, m in model.named_modules()]
    plain = run(model)
    att = attach(model, VERBS[verb])
    changed = run(model)
    assert (changed - plain).abs().max() > 1e-3
    assert torch.equal(run(copy.deepcopy(model)), changed)
    with att.disabled():
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), changed)
    att.detach()
    assert torch.equal(run(model), plain)
    assert [(path, {*vars(m)} - {"train"}, len(m._forward_hooks)) for path, m in model.named_modules()] == [
        (path, names - {"train"}, count) for path, names, count in before
    ]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradients_are_the_same_with_checkpointing(library: str, verb: str) -> None:
    if library not in LIBRARIES:
        pytest.skip(f"{library} is not installed")
    model: Any = LIBRARIES[library]()
    att = attach(model, VERBS[verb])
    att.train()

    def gradients() -> tuple[Tensor, ...]:
        first, second = run(model).square().sum(), run(model, 2 * X).square().sum()
        return torch.autograd.grad(second, att.parameters()) + torch.autograd.grad(first, att.parameters())

    expected = gradients()
    if library == "timm":
        model.set_grad_checkpointing(True)
    else:
        model.activation_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
    if verb == "around blocks and norm":
        block = att.sites.blocks[1].enter.eval()
        assert not torch.equal(tensor_of(block(block_input())), block_input())  # it does not go on passing on


@pytest.mark.parametrize("verb", VERBS)
@torch.no_grad()
def test_compiled_without_a_graph_break(verb: str) -> None:
    model = tiny()
    attach(model, VERBS[verb])
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))


@torch.no_grad()
def test_all_verbs_at_one_site_act_in_the_documented_order() -> None:
    model, x = tiny(), block_input()
    block: Any = model.blocks[0]
    own = copy.deepcopy(block)
    read, added = Matrix(), Matrix()

    def change(edit: petune.Edit) -> None:
        part = edit.sites.blocks[0]
        edit.after(part.mlp, Add(1.0))
        edit.around(part.mlp, Twice())
        edit.before(part.norm2, Times(0.5))
        edit.parallel(part.mid, part, read)
        edit.stream(part.mid, Add(3.0))
        edit.before(part.mlp, Add(2.0))
        edit.parallel(part.mlp, part.mlp, added)
        edit.stream(part.mid, Times(3.0))
        edit.around(part.mlp, Twice())
        edit.after(part.mlp, Times(3.0))

    attach(model, change)
    mid = x + own.attn(own.norm1(x))
    stream = (mid + 3) * 3

    def site(x: Tensor) -> Tensor:
        return (own.mlp(x + 2) + 1 + added(x + 2)) * 3

    def around(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: 0.5 * inner(x) + inner(2 * x)

    expected = stream + around(around(site))(own.norm2(0.5 * stream)) + read(mid)
    torch.testing.assert_close(block(x), expected, atol=1e-4, rtol=1e-4)


def test_a_stream_is_replaced_where_the_residual_sum_is_scaled_or_normalized() -> None:
    layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
    model = PostNorm(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    own = copy.deepcopy(model)
    attach(model, VERBS["stream"], input_size=(3, 16, 16))
    x = own.embed(X.flatten(2).mT)
    for part in own.encoder.layers:
        x = part.norm1(x + part.self_attn(x, x, x, need_weights=False)[0]) * 1.5
        x = part.norm2(x + part.linear2(torch.relu(part.linear1(x))))
    torch.testing.assert_close(model(X), own.head(x.mean(1)), atol=1e-5, rtol=1e-5)


class PostNorm(nn.Module):
    """torch's own encoder, which normalizes sums, on the pixels as tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.embed, self.encoder, self.head = nn.Linear(3, 24), encoder, nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.flatten(2).mT)).mean(1))


def twofold(b: Any, x: Tensor) -> Tensor:
    x = (x + b.a[0](b.n[0](x)) + b.a[1](b.n[1](x))) * 1.5
    return x + b.m[0](b.n[2](x)) + b.m[1](b.n[3](x))


def macaron(b: Any, x: Tensor) -> Tensor:
    x = x + 0.5 * b.m[0](b.n[0](x))
    x = (x + b.a[0](b.n[1](x))) * 1.5
    return x + 0.5 * b.m[1](b.n[2](x))


STREAMS = {
    "twofold": twofold,
    "macaron": macaron,
    "parallel": lambda b, x: b(1.5 * x),  # attention and MLP read one tensor: what enters the block
    "parallel norms": lambda b, x: b(1.5 * x),
}


@pytest.mark.parametrize("name", STREAMS)
@torch.no_grad()
def test_all_that_reads_a_stream_sees_the_new_one(name: str) -> None:
    model: Any = branching_blocks.build(name)
    own = copy.deepcopy(model)
    attach(model, VERBS["stream"])
    for block in own.blocks:
        block.forward = functools.partial(STREAMS[name], copy.deepcopy(block))
    torch.testing.assert_close(model(X), own(X))


@torch.no_grad()
def test_prompts_lora_and_another_attachment_act_inside_an_adapter_around_blocks() -> None:
    model = tiny()
    for method in ("vpt", "lora", "adaptformer"):
        att = petune.attach(model, method, train_head=False)
        for p in att.tuned.values():
            nn.init.normal_(p, std=0.2)
    own: Any = copy.deepcopy(model)
    att = attach(model, VERBS["around blocks and norm"])
    x = own._pos_embed(own.patch_embed(X))
    y = 0.5 * own.norm(own.blocks(x)) + own.norm(own.blocks(2 * x))
    torch.testing.assert_close(model(X), own.head(y[:, 0]))
    att.detach()
    assert torch.equal(model(X), own(X))
    assert torch.equal(model.blocks[1](block_input()), own.blocks[1](block_input()))  # type: ignore[index,operator]


@pytest.mark.parametrize("first", [0, 1])
@torch.no_grad()
def test_forwards_that_two_attachments_replace_are_restored(first: int) -> None:
    model = tiny()
    plain = model(X)
    prompts = petune.attach(model, "vpt", train_head=False)
    attachments = [prompts, attach(model, lambda edit: edit.around(edit.sites.blocks[0], Twice()))]
    attachments.pop(first).detach()
    assert "forward" in vars(model.blocks[0])  # type: ignore[index]
    attachments[0].detach()
    assert not any("forward" in vars(m) for m in model.modules())
    torch.testing.assert_close(model(X), plain)


class Select(nn.Module):
    """Gives every second token of all images to the site, in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, ::2] = self.scale * inner(x[:, ::2].reshape(1, -1, x.shape[-1])).reshape(x[:, ::2].shape)
        return y


class Never(Select):
    """Leaves the site out."""

    def forward(self, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize(("adapter", "tokens"), [(Select, [18]), (Never, [])])
@torch.no_grad()
def test_an_adapter_saves_the_work_of_a_site(adapter: type[nn.Module], tokens: list[int]) -> None:
    model, x = tiny(), block_input()
    mlp: Any = model.blocks[0].mlp  # type: ignore[index]
    whole = mlp(x)
    seen: list[int] = []
    mlp.fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    attach(model, lambda edit: edit.around(edit.sites.blocks[0].mlp, adapter()))
    seen.clear()
    y = mlp(x)
    assert seen == tokens
    if adapter is Select:
        torch.testing.assert_close(y[:, ::2], whole[:, ::2])
        assert not y[:, 1::2].any()
    else:
        assert torch.equal(y, x)


def test_an_exception_inside_leaves_nothing_behind() -> None:
    model = tiny()
    attach(model, VERBS["around blocks and norm"])
    plain = model(X)
    handle = model.blocks[1].register_forward_pre_hook(lambda module, args: 1 / 0)  # type: ignore[index]
    with pytest.raises(ZeroDivisionError):
        model(X)
    handle.remove()
    assert torch.equal(model(X), plain)


BAD: dict[str, tuple[Callable[[petune.Edit], Any], str]] = {
    "a stream at a module": (lambda e: e.stream(e.sites.blocks[0].mlp, Add(1.0)), "Use before or after"),
    "a stream at no site": (lambda e: e.stream(e.model.norm, Add(1.0)), "takes a site"),
    "around a stream": (lambda e: e.around(e.sites.blocks[0].mid, Twice()), "tensor between modules"),
    "around what does not follow": (
        lambda e: e.around([e.sites.blocks[0].attn, e.sites.blocks[0].mlp], Twice()), "computes something between",
    ),
    "around nothing": (lambda e: e.around([], Twice()), "no site"),
    "what leaves a stream": (
        lambda e: e.parallel(e.sites.blocks[0].mid, e.sites.blocks[0], Matrix(), leaving=True), "no module returns",
    ),
    "a side network at a stream": (lambda e: e.side([e.sites.blocks[0].mid], Cell(1)), "tensor between modules"),
    "a side network twice at one block": (lambda e: e.side([*e.sites.blocks[:1]] * 2, Cell(2)), "another module"),
    "a cell without a state": (lambda e: e.side(e.sites.blocks, Add(1.0)), "takes 2 positional arguments"),
    "another number of tokens": (lambda e: e.around(e.sites.blocks[0].mlp, Shorter()), "returned shape"),
}  # fmt: skip


class Shorter(Twice):
    """Returns fewer tokens than it was given."""

    def forward(self, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.value * inner(x[:, 1:])


@pytest.mark.parametrize("case", BAD)
def test_a_verb_that_cannot_be_is_one_error_and_leaves_the_model_alone(case: str) -> None:
    change, message = BAD[case]
    model = tiny().requires_grad_(False)
    plain, keys = model(X), {path: {*vars(m)} for path, m in model.named_modules()}
    with pytest.raises(petune.PetuneError, match=message):
        attach(model, change)
    assert torch.equal(model(X), plain)
    assert {path: {*vars(m)} - {"train"} for path, m in model.named_modules()} == {
        path: names - {"train"} for path, names in keys.items()
    }
