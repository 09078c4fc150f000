"""The plugins that choose what they train, and that add keys and values: equal to the papers' formulas and counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.plugin_dev.tiny_models import tiny_timm
from tests.tiny import randomised
from tests.tuned import D, X, attached
from tests.tuners.test_formulas import assert_same, attention, forward, plain_mlp


def test_prefix() -> None:
    att = attached("prefix", length=5)

    def with_prefix(b: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (x @ b.attn.qkv.weight.T + b.attn.qkv.bias).chunk(3, -1)
        a = b.petune_prefix_attn.adapter
        k, v = (torch.cat([y.expand(2, -1, -1), z], 1) for y, z in ((a.keys, k), (a.values, v)))
        q, k, v = (y.unflatten(-1, (b.attn.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        mixed = ((q @ k.mT) * b.attn.head_dim**-0.5).softmax(-1) @ v
        return mixed.transpose(1, 2).flatten(2) @ b.attn.proj.weight.T + b.attn.proj.bias

    assert_same(att, forward(att.model, with_prefix, lambda b, x: plain_mlp(b.mlp, x)))
    assert att.counts.tuned == 2 * 2 * 5 * D


def calibrated(method: str, **options: object) -> tuple[petune.Attachment, Tensor, Tensor]:
    """Attach a method and let it choose on four images of two classes."""
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    y = torch.tensor([0, 1, 0, 1])
    att = petune.attach(tiny_timm(init_values=0.3), method, **options)
    att.calibrate([(x[:2], y[:2]), (x[2:], y[2:])] if method == "sct" else [(x, y)])
    return att, x, y


@pytest.mark.parametrize("place", ["attn", "mlp"])
def test_sct(place: str) -> None:
    torch.manual_seed(0)
    att, x, y = calibrated("sct", place=place, num_channels=5, scale=0.5)
    streams: list[Tensor] = []
    plain = tiny_timm(init_values=0.3)
    for block in plain.blocks:
        read = block.norm2.register_forward_pre_hook if place == "attn" else block.register_forward_hook
        read(lambda m, a, out=None: streams.append(a[0] if out is None else out))
    plain(x)
    adapters = [next(m for m in b.modules() if type(m).__name__ == "SalientChannels") for b in att.model.blocks]
    for adapter, stream in zip(adapters, streams, strict=True):
        norms = torch.stack([stream[y == c][:, 1:].flatten(0, 1).norm(dim=0) for c in (0, 1)]).mean(0)
        assert adapter.channels.tolist() == sorted(norms.topk(5).indices.tolist())

    randomised(att)

    def adapted(adapter: nn.Module, z: Tensor) -> Tensor:
        change = 0.5 * (z[..., adapter.channels] @ adapter.linear.weight.T + adapter.linear.bias)
        return z.index_add(-1, adapter.channels, change)

    with torch.no_grad():
        x = att.model._pos_embed(att.model.patch_embed(X))
        for block, adapter in zip(att.model.blocks, adapters, strict=True):
            x = x + block.ls1(attention(block.attn, block.norm1(x)))
            x = adapted(adapter, x) if place == "attn" else x
            normed = nn.functional.layer_norm(x, (D,), block.norm2.weight, block.norm2.bias, block.norm2.eps)
            out = plain_mlp(block.mlp, normed)
            x = x + block.ls2(out if place == "attn" else adapted(adapter, out))
        by_hand = att.model.head(att.model.norm(x)[:, 0])
    assert_same(att, by_hand)


def test_gps() -> None:
    att, x, y = calibrated("gps", per_output=2)
    plain = tiny_timm(init_values=0.3)
    features = nn.functional.normalize(plain.forward_head(plain.forward_features(x), pre_logits=True))
    similar = (features @ features.T / 0.07).exp() * (1 - torch.eye(4))
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j and y[i] == y[j]]
    torch.stack([-(similar[i, j] / similar[i].sum()).log() for i, j in pairs]).mean().backward()
    masks = {id(p): mask for e in att.edit_log.sparse for p, mask in zip(e.targets, e.masks(), strict=True)}
    trained = 0
    own = dict(att.model.named_parameters())
    for key, p in plain.named_parameters():
        mask = masks.get(id(own[key]))
        others = ("norm1.", "norm2.", "ls1.", "ls2.", "norm.", "head.", "pos_embed", "cls_token")
        is_layer = not any(part in key for part in others)
        assert (mask is not None) is is_layer, key
        if mask is not None:
            largest = p.grad.flatten(1).abs().topk(2, dim=1).indices if p.ndim > 1 else None
            chosen = mask.flatten(1).nonzero()[:, 1].view(-1, 2) if p.ndim > 1 else None
            assert bool(mask.all()) if largest is None else torch.equal(chosen, largest.sort(1).values)
            trained += int(mask.sum())
    assert att.counts.tuned == trained == att.tuner.num_parameters(att.sites)


def test_gps_needs_classes() -> None:
    att = petune.attach(tiny_timm(), "gps")
    with pytest.raises(petune.PetuneError, match="Use gps:loss=task"):
        att.calibrate([(X, torch.rand(2, 3))])
    task = petune.attach(tiny_timm(), "gps", loss="task")
    task.calibrate([(X, torch.rand(2, 3))])
    assert task.is_calibrated
