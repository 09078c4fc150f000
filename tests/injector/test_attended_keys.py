"""Further queries that attend to the keys and values of the blocks, for the head alone: VQT (arXiv 2212.03220)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import AttachError
from petune.plugin_dev.tiny_models import tiny_models, tiny_timm, tiny_torchvision
from tests.injector.test_attention import with_keys
from tests.injector.test_edit import Custom, Times
from tests.tiny import X


class Queries(nn.Module):
    """Two queries for each block; what they attend to goes to the head, concatenated over the blocks."""

    def __init__(self, attentions: list[petune.Attention], classes: int) -> None:
        super().__init__()
        sizes = [(1, a.num_heads, 2, a.head_dim) for a in attentions]
        self.queries = nn.ParameterList(torch.randn(size) for size in sizes)
        self.head = nn.Linear(sum(2 * a.num_heads * a.v_head_dim for a in attentions), classes)

    def forward(self, state: Tensor | None, x: Any, index: int) -> tuple[Tensor, Tensor | None]:
        if index == len(self.queries):
            return state, self.head(state)
        keys, values = x
        y = nn.functional.scaled_dot_product_attention(self.queries[index].expand(len(keys), -1, -1, -1), keys, values)
        y = y.flatten(1)
        return y if state is None else torch.cat([state, y], 1), None


def vqt(edit: petune.Edit) -> None:
    attentions = [edit.attention(block) for block in edit.sites.require_blocks()]
    edit.side([*attentions, edit.sites.head], Queries(attentions, 3))


def attached(model: nn.Module) -> tuple[petune.Attachment, Queries]:
    torch.manual_seed(0)
    att = petune.attach(model, Custom(vqt), name="vqt")
    return att, next(m for m in model.modules() if isinstance(m, Queries))


LAYERS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "timm": lambda model: [block.attn.qkv for block in model.blocks],
    "transformers": lambda m: [m.get_submodule(n) for n, _ in m.named_modules() if n.endswith(("k_proj", "v_proj"))],
}


def keys_and_values(library: str, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return what the layers make of the images, in one row of channels."""
    outputs: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda m, a, y: outputs.append(y.detach())) for m in LAYERS[library](model)]
    model(X)
    for hook in hooks:
        hook.remove()
    pairs = zip(outputs[::2], outputs[1::2], strict=True)
    return list(pairs) if library == "transformers" else [(y[..., 24:48], y[..., 48:]) for y in outputs]


def logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("library", sorted(LAYERS))
def test_logits_are_those_of_the_formula(library: str, fused: bool) -> None:
    build = (lambda: tiny_timm()) if library == "timm" else tiny_models()[library]
    plain, model = build(), build()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    if library == "transformers" and not fused:
        model.set_attn_implementation("eager")
    _, cell = attached(model)
    summaries = []
    for (k, v), q in zip(keys_and_values(library, plain), cell.queries, strict=True):
        k, v = (y.unflatten(-1, (2, 12)).transpose(1, 2) for y in (k, v))
        summaries.append((((q @ k.mT) / 12**0.5).softmax(-1) @ v).flatten(1))
    expected = logits(plain(X)) + torch.cat(summaries, 1) @ cell.head.weight.T + cell.head.bias
    torch.testing.assert_close(logits(model(X)), expected)


@pytest.mark.parametrize("build", [tiny_timm, tiny_torchvision])
def test_no_gradient_runs_through_the_backbone(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = model(X)
    att, _ = attached(model)
    with_gradient: list[bool] = []
    for name, module in model.named_modules():
        if name.endswith(("mlp", "attn", "self_attention")):
            module.register_forward_hook(
                lambda m, a, y: with_gradient.append((y[0] if isinstance(y, tuple) else y).requires_grad)
            )
    model(X).sum().backward()
    assert with_gradient == [False] * 4
    assert all(p.grad is not None and p.grad.any() for p in att.tuned.values())
    with torch.no_grad():
        assert not torch.allclose(model(X), before, atol=1e-3)
    with att.disabled():
        torch.testing.assert_close(model(X), before)
    att.detach()
    assert torch.equal(model(X), before)
    assert not [m for m in model.modules() if "forward" in vars(m)]


@pytest.mark.filterwarnings("ignore")
def test_compiled_and_with_more_keys() -> None:
    model = tiny_torchvision()
    attached(model)
    plain = model(X)
    torch.testing.assert_close(torch.compile(model, backend="eager")(X), plain)
    petune.attach(model, Custom(with_keys), name="keys")
    longer = model(X)
    assert not torch.allclose(longer, plain, atol=1e-3)
    torch.testing.assert_close(torch.compile(model, backend="eager")(X), longer)


def test_keys_after_their_norm_and_rotation() -> None:
    options = {"img_size": 64, "depth": 1, "num_heads": 2, "embed_dim": 24, "num_classes": 3}
    model = timm.create_model("vit_small_patch16_dinov3", **options).eval()
    seen: list[Tensor] = []

    class Keep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, state: Tensor | None, x: Any, index: int) -> tuple[Tensor, Tensor]:
            seen.append(x[0].detach())
            return x[0], self.scale * x[1].transpose(1, 2).flatten(2)

    def read(edit: petune.Edit) -> None:
        attention = edit.attention(edit.sites.blocks[0])
        edit.side([attention], Keep())

    x, unrotated = torch.randn(1, 3, 64, 64), []
    petune.attach(model, Custom(read), name="keep")
    model.blocks[0].attn.qkv.register_forward_hook(lambda m, a, y: unrotated.append(y[..., 24:48]))
    model(x)
    keys = seen[-1].transpose(1, 2).flatten(2)
    torch.testing.assert_close(keys.norm(), unrotated[-1].norm())  # a rotation keeps lengths
    assert not torch.allclose(keys, unrotated[-1], atol=1e-3)


def test_masked_tokens_and_windows_are_refused() -> None:
    model = tiny_timm()
    model.blocks[0].attn.forward_before = model.blocks[0].attn.forward
    mask = torch.zeros(1, 1, 17, 17).masked_fill(torch.arange(17) > 9, -torch.inf)
    model.blocks[0].attn.forward = lambda x, **options: model.blocks[0].attn.forward_before(x, attn_mask=mask)
    with pytest.raises(AttachError, match="hides some tokens"):
        attached(model)
    sizes = {"embed_dim": 24, "window_size": 4, "depths": [2], "num_heads": [2]}
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=3, **sizes)
    with pytest.raises(AttachError):
        attached(swin)


def test_a_copy_and_a_second_attachment_are_independent() -> None:
    model = tiny_timm()
    att, _ = attached(model)
    expected = model(X)
    second = petune.attach(
        model, Custom(lambda edit: edit.after(edit.attention(edit.sites.blocks[0]).k, Times(2.0))), name="second"
    )
    assert not torch.allclose(model(X), expected)
    second.detach()
    assert torch.equal(model(X), expected)
    att.detach()
    assert torch.equal(model(X), tiny_timm()(X))


def attends_with(change: Callable[[Tensor], Tensor], model: nn.Module) -> nn.Module:
    """Let the first attention change q · k before its softmax."""
    attn = model.blocks[0].attn

    def forward(x: Tensor, **options: Any) -> Tensor:
        q, k, v = attn.qkv(x).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        weights = change(q * attn.scale @ k.mT).softmax(-1)
        return attn.proj((weights @ v).transpose(1, 2).flatten(2))

    attn.forward = forward
    return model


def in_place(logits: Tensor) -> Tensor:
    logits[..., 1:] += PAIRS[:, 1:]
    return logits


PAIRS = torch.linspace(-1, 1, 17 * 17).reshape(17, 17)
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "added": lambda logits: logits + PAIRS,
    "added in place to the patches": lambda logits: in_place(logits),
    "subtracted": lambda logits: logits - PAIRS.abs(),
    "multiplied": lambda logits: logits * PAIRS,
    "multiplied by a weight of each key": lambda logits: logits * PAIRS[0],
    "divided by a weight of each key": lambda logits: logits / PAIRS[0].exp(),
    "squared": lambda logits: logits * logits,
    "clamped": lambda logits: logits.clamp(-0.1, 0.1),
    "clamped in place": lambda logits: logits.clamp_(-0.1, 0.1),
    "capped": lambda logits: 0.1 * torch.tanh(logits / 0.1),
    "without a softmax": lambda logits: nn.functional.relu(logits),
    "heads mixed": lambda logits: nn.functional.linear(logits.movedim(1, -1), torch.ones(2, 2)).movedim(-1, 1),
    "chosen": lambda logits: torch.where(torch.arange(17) < 12, logits, -torch.inf),
    "by another attention": lambda logits: logits.lerp(PAIRS.expand_as(logits), 0.5),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_attentions_where_more_than_q_and_k_decides_are_refused(name: str) -> None:
    model = attends_with(CHANGES[name], tiny_timm())
    before = model(X)
    with pytest.raises(AttachError, match="further queries would not know"):
        attached(model)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("fused", [True, False])
def test_a_bias_of_positions_is_refused_and_one_of_zeros_changes_nothing(fused: bool) -> None:
    options = {"img_size": 32, "depth": 2, "num_heads": 2, "embed_dim": 24, "num_classes": 3}
    model = timm.create_model("beit_base_patch16_224", **options).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
        nn.init.ones_(block.attn.relative_position_bias_table[:3])
    with pytest.raises(AttachError, match="further queries would not know"):
        attached(model)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.relative_position_bias_table.zero_()
    attached(model)
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()
    with torch.no_grad():
        model.blocks[0].attn.relative_position_bias_table[0] = 1
    with pytest.raises(AttachError, match="further queries would not know"):
        model(torch.randn(1, 3, 32, 32))


HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda logits: logits * torch.ones(2, 1, 1) + 1 - logits.amax(-1, keepdim=True),
    "one factor for all keys": lambda logits: logits * torch.full((17,), 2.0) / torch.tensor(3.0),
    "clamped far away": lambda logits: torch.clamp(logits, min=-50000),
}


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_scaled_products_are_read(name: str) -> None:
    model = attends_with(HARMLESS[name], tiny_timm())
    _, cell = attached(model)
    assert len(cell.queries) == 2


def test_channels_that_attend_to_channels_are_refused() -> None:
    options = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("xcit_nano_12_p16_224", **options).eval()
    widths: list[tuple[int, int]] = []

    def look(edit: petune.Edit) -> None:
        attention = edit.attention(edit.sites.blocks[0])
        widths.append((attention.head_dim, attention.v_head_dim))
        edit.after(attention.q, Times(2.0))

    petune.attach(model, Custom(look), name="look").detach()
    assert widths == [(16, 16)]
    with pytest.raises(AttachError, match="keys and values of whole images"):
        attached(model)
