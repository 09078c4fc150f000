"""AdaptFormer and VPT on well-known families, compared with a hand-written forward over the family's own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from survey.pairs import enliven
from torch import Tensor, nn
from torch.nn import functional as F

import petune
from petune.base.yaml_values import parse_options

SHAPE = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 3}
FAMILIES = {
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, 5),
    "DeiT-3": ("deit3_small_patch16_224", {"drop_path_rate": 0.2}, 1),
    "EVA-02": ("eva02_tiny_patch14_224", {"img_size": 56}, 1),
    "DINOv3": ("vit_small_patch16_dinov3", {}, 5),
    "BEiT": ("beit_base_patch16_224", {}, 1),
    "SigLIP": ("vit_base_patch16_siglip_224", {}, 0),
}
Step = Callable[[nn.Module, Tensor, int, int], Tensor]


def built(family: str) -> nn.Module:
    name, more, _ = FAMILIES[family]
    model = enliven(timm.create_model(name, pretrained=False, **{**SHAPE, **more}))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():  # weights of a size at which a misplaced token is seen in the logits
        if p.ndim >= 2:
            nn.init.normal_(p, std=0.2, generator=generator)
    return model


def embedded(model: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the tokens that enter the first block, and the table of rotations if there is one."""
    x = model.patch_embed(x)
    if hasattr(model, "rope"):
        return model._pos_embed(x)
    if hasattr(model, "_pos_embed"):
        return model.norm_pre(model._pos_embed(x)), None
    return torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1), None  # BEiT: positions are in its attention


def attend(block: Any, x: Tensor, rope: Tensor | None, index: int, count: int) -> Tensor:
    """Return attention over all tokens; `count` tokens at `index` have no position: no rotation and no bias."""
    a = block.attn
    if a.qkv is not None and getattr(a, "q_bias", None) is not None:
        bias = torch.cat([a.q_bias, torch.zeros_like(a.q_bias), a.v_bias])
        q, k, v = F.linear(x, a.qkv.weight, bias).chunk(3, -1)
    elif a.qkv is not None:
        q, k, v = a.qkv(x).chunk(3, -1)
    else:
        q, k, v = a.q_proj(x), a.k_proj(x), a.v_proj(x)
    q, k, v = (t.unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    if rope is not None:
        first = index + count
        sin, cos = rope.chunk(2, -1)
        half = getattr(a, "rotate_half", False)
        q, k = (torch.cat([t[:, :, :first], rotated(t[:, :, first:], sin, cos, half)], 2) for t in (q, k))
    logits = q @ k.mT * (q.shape[-1] ** -0.5)
    if getattr(a, "relative_position_bias_table", None) is not None:
        real = [i for i in range(x.shape[1]) if not index <= i < index + count]
        area = len(real)
        bias = a.relative_position_bias_table[a.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
        rows = torch.tensor(real)
        logits[:, :, rows[:, None], rows[None]] += bias
    y = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = a.norm(y) if isinstance(getattr(a, "norm", None), nn.Module) else y
    return a.proj(y)


def rotated(x: Tensor, sin: Tensor, cos: Tensor, half: bool) -> Tensor:
    if half:
        one, two = x.chunk(2, -1)
        return x * cos + torch.cat([-two, one], -1) * sin
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


def scaled(block: Any, which: int) -> Callable[[Tensor], Tensor]:
    """Return LayerScale under its several names."""
    gamma = getattr(block, f"gamma_{which}", None)
    if gamma is not None:
        return lambda y: gamma * y
    return getattr(block, f"ls{which}", lambda y: y)


def by_hand(model: Any, images: Tensor, method: str, adapters: list[nn.Module], index: int) -> Tensor:
    """Return the logits: AdaptFormer parallel to the MLP, or VPT's prompts after the prefix tokens."""
    x, rope = embedded(model, images)
    for i, block in enumerate(model.blocks):
        count = 0
        if method == "vpt" and (i == 0 or len(adapters) > 1):
            tokens = adapters[i].tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :index], tokens, x[:, index:]], 1)
        if method == "vpt":
            count = adapters[0].num_prompts
        x = x + scaled(block, 1)(attend(block, block.norm1(x), rope, index, count))
        change: Any = adapters[i](x) if method == "adaptformer" else 0
        x = x + scaled(block, 2)(block.mlp(block.norm2(x))) + change
        if method == "vpt" and (len(adapters) > 1 or i + 1 == len(model.blocks)):
            x = torch.cat([x[:, :index], x[:, index + count :]], 1)
    x = model.norm(x)
    return model.forward_head(x)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["adaptformer:bottleneck=5", "vpt:num_prompts=3", "vpt:num_prompts=3,deep=false"])
def test_equal_to_the_forward_by_hand(family: str, method: str) -> None:
    model = built(family)
    images = torch.randn(2, 3, model.patch_embed.img_size[0], model.patch_embed.img_size[0])
    name, _, options = method.partition(":")
    with torch.no_grad():
        bare = by_hand(model, images, "none", [], FAMILIES[family][2])
        torch.testing.assert_close(bare, model(images), atol=1e-4, rtol=1e-3)
        att = petune.attach(model, name, **parse_options(options))
        for p in att.tuned.values():
            nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(1))
        adapters = [m.adapter for m in model.modules() if hasattr(m, "is_petune_module") and hasattr(m, "adapter")]
        tuned = model(images)
        with att.disabled():
            plain = model(images)
            expected = by_hand(model, images, name, adapters, FAMILIES[family][2])
    torch.testing.assert_close(tuned, expected, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(tuned, plain, atol=4e-3)
    assert att.sites.num_prefix_tokens == FAMILIES[family][2]
