"""`edit.attention` and `edit.keys_values`: q, k and v alone, and more keys and values, whatever the attention is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import petune
from petune.base.errors import AttachError, NotMergeable, SiteNotFound
from petune.plugin_dev.tiny_models import tiny_models, tiny_timm
from tests.injector.test_edit import Add, Custom, Times
from tests.tiny import X, tiny


class Constant(nn.Module):
    """Keys and values that are the same for every image."""

    def __init__(self, width: int, number: int = 3) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(1, number, width))
        self.values = nn.Parameter(torch.randn(1, number, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class OfImage(Constant):
    """Keys and values that depend on the image."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.keys * x.mean((1, 2), keepdim=True), self.values * x.mean((1, 2), keepdim=True)


class GroupedAttention(nn.Module):
    """Four heads of queries, two of keys and values, and 1×1 convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q = nn.Conv2d(dim, dim, 1)
        self.kv = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        image = x.transpose(1, 2).unsqueeze(-1)
        q = self.q(image).flatten(2).unflatten(1, (4, -1)).mT
        k, v = self.kv(image).flatten(2).unflatten(1, (2, 2, -1)).mT.unbind(1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


def look(model: nn.Module) -> list[petune.Attention]:
    found: list[petune.Attention] = []

    def change(edit: petune.Edit) -> None:
        found.extend(edit.attention(block) for block in edit.sites.blocks)
        edit.train(edit.sites.blocks[0].mlp)

    petune.attach(model, Custom(change), name="look").detach()
    return found


@pytest.mark.parametrize("library", sorted(tiny_models()))
def test_heads_and_scale_of_every_library(library: str) -> None:
    for attention in look(tiny_models()[library]()):
        assert (attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.v_head_dim) == (2, 2, 12, 12)
        assert attention.scale == pytest.approx(12**-0.5)


def test_parts_of_a_fused_layer_and_of_three_layers() -> None:
    (first, _) = look(tiny_timm())
    assert [part.where for part in (first.q, first.k, first.v)] == [
        f"blocks.0.attn.qkv[{i}:{i + 24}]" for i in (0, 24, 48)
    ]
    (first, _) = look(tiny_models()["transformers"]())
    assert [part.part for part in (first.q, first.k, first.v)] == [None] * 3
    assert [part.path.rpartition(".")[2] for part in (first.q, first.k, first.v)] == ["q_proj", "k_proj", "v_proj"]


def test_heads_that_share_keys_and_convolutions() -> None:
    model = tiny()
    for block in model.blocks:
        block.attn = GroupedAttention(24)
    attention = look(model)[0]
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.scale) == (4, 2, 6, 0.5)
    assert [(part.part, part.dim, part.layout) for part in (attention.q, attention.k, attention.v)] == [
        (None, 24, "BCHW"), ((0, 12), 12, "BCHW"), ((12, 24), 12, "BCHW"),
    ]  # fmt: skip


def by_hand(model: nn.Module, change: Callable[[Tensor, Tensor, Tensor], Any]) -> Tensor:
    """timm's ViT, written out, with a function of q, k and v (B, N, D) before heads are formed."""
    x = model._pos_embed(model.patch_embed(X))
    for block in model.blocks:
        qkv = block.norm1(x) @ block.attn.qkv.weight.T + block.attn.qkv.bias
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in change(*qkv.chunk(3, -1)))
        y = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[:, 0])


def test_after_and_parallel_change_q_and_v_alone() -> None:
    def change(edit: petune.Edit) -> None:
        for block in edit.sites.blocks:
            attention = edit.attention(block)
            edit.after(attention.q, Times(3.0))
            edit.parallel(attention.v, attention.v, nn.Linear(24, 24, bias=False))

    model = tiny()
    torch.manual_seed(0)
    base = copy.deepcopy(model)
    att = petune.attach(model, Custom(change), name="parts")
    (layers,) = [[p for key, p in att.tuned.items() if key.endswith("weight")]]
    inputs = iter(layers)
    hidden: list[Tensor] = []
    for block in base.blocks:
        block.norm1.register_forward_hook(lambda m, a, y: hidden.append(y))
    expected = by_hand(base, lambda q, k, v: (3 * q, k, v + hidden[-1] @ next(inputs).T))
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(NotMergeable):
        att.merge()
    att.detach()
    assert torch.equal(model(X), tiny()(X))


def with_keys(edit: petune.Edit, make: type[Constant] = Constant) -> None:
    for block in edit.sites.blocks:
        attention = edit.attention(block)
        edit.keys_values(block, make(attention.num_kv_heads * attention.head_dim))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("make", [Constant, OfImage])
def test_tokens_attend_to_more_keys_as_in_the_formula(fused: bool, make: type[Constant]) -> None:
    model = tiny()
    for block in model.blocks:
        block.attn.fused_attn = fused
    att = petune.attach(model, Custom(lambda edit: with_keys(edit, make)), name="keys")
    adapters = iter([block.petune_keys_attn.adapter for block in model.blocks])
    entered: list[Tensor] = []
    base = copy.deepcopy(model)
    for block in base.blocks:
        block.norm1.register_forward_hook(lambda m, a, y: entered.append(y))

    def longer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = (y.expand(2, -1, -1) for y in next(adapters)(entered[-1]))
        return q, torch.cat([keys, k], 1), torch.cat([values, v], 1)

    torch.testing.assert_close(model(X), by_hand(base, longer), atol=1e-5, rtol=1e-5)
    with att.disabled():
        plain = with_frozen(tiny(), model)
        for block in plain.blocks:
            block.attn.fused_attn = fused
        assert torch.equal(model(X), plain(X))


def with_frozen(base: nn.Module, like: nn.Module) -> nn.Module:
    """The model with the flags of another one: torch multiplies frozen weights by another kernel."""
    flags = dict(like.named_parameters())
    for key, p in base.named_parameters():
        p.requires_grad_(flags[key].requires_grad)
    return base


@pytest.mark.parametrize("library", ["torchvision", "transformers"])
def test_other_libraries_attend_to_them_with_and_without_gradients(library: str) -> None:
    model = tiny_models()[library]()
    petune.attach(model, Custom(with_keys), name="keys")
    outputs = model(X)
    with torch.no_grad():
        torch.testing.assert_close(getattr(model(X), "logits", model(X)), getattr(outputs, "logits", outputs))


def test_zero_values_of_torch_s_attention_only_share_the_weights() -> None:
    """Keys that get no weight change nothing: torch's attention is computed as before."""
    model = tiny_models()["torchvision"]()
    before = model(X)
    att = petune.attach(model, Custom(with_keys), name="keys")
    attention = model.encoder.layers[0].self_attention
    with torch.no_grad():
        for p in att.tuned.values():
            p.zero_()
    mha = copy.deepcopy(attention)
    del mha.forward
    x = torch.randn(2, 5, 24)
    plain, _ = mha(x, x, x)
    shared, weights = attention(x, x, x, need_weights=True)
    sums = weights.sum(-1, keepdim=True)
    assert sums.max() < 1
    assert not torch.allclose(shared, plain)
    att.detach()
    torch.testing.assert_close(model(X), before)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_positions_are_for_tokens_only(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"patch_size": 16, "depth": 2, "num_heads": 2}
    sizes.pop("patch_size") if "dinov3" in name else None
    model = timm.create_model(name, img_size=64, num_classes=3, embed_dim=24, **sizes).eval()
    x = torch.randn(1, 3, 64, 64)
    att = petune.attach(model, Custom(with_keys), name="keys")
    fused = model(x)
    for module in model.modules():
        if getattr(module, "fused_attn", None) is True:
            module.fused_attn = False
    torch.testing.assert_close(model(x), fused)
    assert att.tuned


@pytest.mark.filterwarnings("ignore")
def test_compiled_checkpointed_and_copied() -> None:
    model = tiny()
    att = petune.attach(model, Custom(with_keys), name="keys")
    expected = model(X)
    expected.sum().backward()
    gradients = {key: p.grad.clone() for key, p in att.tuned.items()}
    for forward in (torch.compile(model, backend="eager"), checkpointed(model)):
        model.zero_grad()
        y = forward(X)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        for key, p in att.tuned.items():
            torch.testing.assert_close(p.grad, gradients[key])
    model.set_grad_checkpointing(False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in att.tuned.values():
            p.zero_()
    torch.testing.assert_close(other(X), expected)


def checkpointed(model: Any) -> nn.Module:
    model.set_grad_checkpointing()
    return model


class Wrong(nn.Module):
    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        return self.made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, b: e.before(e.attention(b).q, Add(1.0)), "whole layer reads that input. Use after or parallel"),
        (lambda e, b: e.keys_values(b, Wrong(5)), "returned int. Return as many keys as values"),
        (
            lambda e, b: e.keys_values(b, Wrong((torch.zeros(3, 24), torch.zeros(3, 24)))),
            "Return as many keys as values",
        ),
        (lambda e, b: [e.keys_values(b, Constant(24)) for _ in range(2)], "has keys and values of another adapter"),
    ],
)
def test_what_makes_no_sense_is_one_clear_error(change: Callable[..., Any], message: str) -> None:
    model = tiny()
    with pytest.raises(AttachError, match=message):
        petune.attach(model, Custom(lambda edit: change(edit, edit.sites.blocks[0])), name="bad")
    assert "forward" not in vars(model.blocks[0].attn)
    assert torch.equal(model(X), tiny()(X))


def test_a_model_without_attention_or_with_windows_is_refused() -> None:
    def look_at(edit: petune.Edit) -> None:
        edit.attention(edit.sites.require_blocks()[0])

    plain = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(SiteNotFound, match="no attention"):
        petune.attach(plain, Custom(look_at), name="look", input_size=(3, 16, 16))
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        num_classes=3,
        embed_dim=24,
        window_size=4,
        depths=[2],
        num_heads=[2],
    )
    with pytest.raises(AttachError, match="WindowAttention takes no further keys"):
        petune.attach(swin, Custom(with_keys), name="keys")
