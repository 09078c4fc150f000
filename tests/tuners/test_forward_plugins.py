"""The plugins that change the forward (Mona, DyT, DTL, L2P): equal to the papers' formulas, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, normalize

import petune
from petune.plugin_dev.tiny_models import tiny_timm
from tests.tuned import D, X, attached
from tests.tuners.test_formulas import assert_same


def adapter(module: Any, name: str) -> Any:
    return getattr(module, f"petune_{name}").adapter


def linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def tokens(model: Any) -> Tensor:
    return model._pos_embed(model.patch_embed(X))


def head(model: Any, x: Tensor) -> Tensor:
    return model.head(model.norm(x)[:, 0])


def attend(block: Any, x: Tensor) -> Tensor:
    return x + block.ls1(block.attn(block.norm1(x)))


def on_grid(x: Tensor, filtered: Callable[[Tensor], Tensor]) -> Tensor:
    """Filter 4×4 patches, and the class token as an image of one pixel."""
    patches = filtered(x[:, 1:].mT.reshape(len(x), -1, 4, 4)).flatten(2).mT
    return torch.cat([filtered(x[:, :1, :, None].transpose(1, 2)).flatten(2).mT, patches], 1)


def mona(a: Any, x: Tensor) -> Tensor:
    h = layer_norm(x, (D,), a.norm.weight, a.norm.bias) * a.norm_scale + x * a.input_scale

    def filtered(h: Tensor) -> Tensor:
        convs = a.filters.sizes
        mean = sum(conv2d(h, c.weight, c.bias, padding=i + 1, groups=h.shape[1]) for i, c in enumerate(convs)) / 3
        h = h + mean
        return (
            h
            + torch.einsum("mn,bnrc->bmrc", a.filters.pointwise.weight[..., 0, 0], h)
            + a.filters.pointwise.bias[:, None, None]
        )

    return x + linear(a.up, gelu(on_grid(linear(a.down, h), filtered)))


def test_mona() -> None:
    att = attached("mona", bottleneck=4)
    model: Any = att.model
    x = tokens(model)
    for block in model.blocks:
        x = mona(adapter(block, "mona_mid"), attend(block, x))
        a = adapter(block, "mona")
        x = mona(a, x + block.ls2(block.mlp(block.norm2.forward(x))))
    assert_same(att, head(model, x))


def test_mona_filters_every_stage_of_swin_on_its_own_grid() -> None:
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **sizes)
    att = petune.attach(model, "mona", bottleneck=4)
    seen: list[tuple[int, ...]] = []
    for block in att.sites.blocks:
        for filters in (m for m in block.enter.modules() if type(m).__name__ == "Filters"):
            filters.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[1:])))
    model(torch.randn(1, 3, 32, 32))
    assert [shape for shape in seen if shape[1:] != (1, 1)] == [(4, 16, 16)] * 2 + [(4, 8, 8)] * 2


def dyt_forward(att: petune.Attachment, choose: Callable[[Any, Tensor], Tensor]) -> Tensor:
    model: Any = att.model
    x = tokens(model)
    for block in model.blocks:
        x = attend(block, x)
        gate = next(m for m in block.modules() if type(m).__name__ == "Dispatch")
        chosen = torch.cat([torch.ones(len(x), 1, 1), choose(gate.gate, x[:, 1:])], 1)
        a = next(m for m in block.modules() if type(m).__name__ == "Bottleneck")
        y = block.mlp.fc2(gelu(block.mlp.fc1(layer_norm(x, (D,), block.norm2.weight, block.norm2.bias, 1e-6))))
        x = x + block.ls2(chosen * y) + 0.1 * linear(a.up, torch.relu(linear(a.down, x)))
    return head(model, x)


def test_dyt_in_evaluation_gives_the_chosen_tokens_alone_to_the_mlp() -> None:
    att = attached("dyt", bottleneck=4)
    model: Any = att.model
    rows: list[int] = []
    model.blocks[0].mlp.fc1.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[-2]))
    counts: list[float] = []

    def choose(gate: Any, x: Tensor) -> Tensor:
        chosen = (linear(gate, x).sigmoid() > 0.5).float()
        counts.append(float(chosen.sum()))
        return chosen

    with torch.no_grad():
        by_hand = dyt_forward(att, choose)
        rows.clear()
        assert_same(att, by_hand)
    assert 0 < counts[0] < 32
    assert rows[0] == 2 + counts[0]


def test_dyt_in_training_has_noise_a_rate_and_gradients_for_tokens_left_out() -> None:
    att = attached("dyt", bottleneck=4, dropout=0.0, rate=0.3)
    att.train()
    torch.manual_seed(5)
    loss = att.model(X).square().sum() + att.loss(0)
    torch.manual_seed(5)
    rates: list[Tensor] = []

    def choose(gate: Any, x: Tensor) -> Tensor:
        noise = -torch.empty(2, len(x), 16, 1).exponential_().log()
        soft = ((linear(gate, x) + noise[0] - noise[1]) / 5).sigmoid()
        rates.append((hard := (soft > 0.5).float() - soft.detach() + soft).mean())
        return hard

    by_hand = dyt_forward(att, choose).square().sum() + 2 * (torch.stack(rates).mean() - 0.3) ** 2
    torch.testing.assert_close(loss, by_hand, atol=1e-4, rtol=1e-4)
    tuned = [*att.tuned.values()]
    slopes, expected = torch.autograd.grad(loss, tuned), torch.autograd.grad(by_hand, tuned)
    torch.testing.assert_close(slopes, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kernel", [0, 3])
def test_dtl(kernel: int) -> None:
    att = attached("dtl", last=1, rank=3, beta=2.0, kernel=kernel)
    model: Any = att.model
    side = adapter(model.blocks[0], "dtl")
    x, h = tokens(model), torch.zeros(())
    for index, block in enumerate(model.blocks):
        h = h + x @ side.down[index].T @ side.up[index].T
        x = attend(block, x)
        x = x + block.ls2(block.mlp(block.norm2(x)))
        if index:
            y = h * (2.0 * h).sigmoid()
            if kernel:
                grid = y[:, 1:].mT.reshape(len(y), D, 4, 4)
                y = torch.cat([y[:, :1], conv2d(grid, side.conv.weight, padding=1, groups=D).flatten(2).mT], 1)
            x = x + y
    assert_same(att, head(model, x))


def test_dtl_sends_no_gradient_through_the_blocks_before_the_last_ones() -> None:
    att = attached("dtl", last=1)
    reached: list[bool] = []
    for block in att.sites.blocks:
        block.enter.register_forward_hook(lambda m, args, y: reached.append(y.requires_grad))
    att.model(X)
    assert reached == [False, True]


def test_l2p() -> None:
    att = attached("l2p", pool_size=4, top_k=2, length=3, pull=0.2)
    model: Any = att.model
    pool = adapter(model.blocks[0], "l2p")
    att.train()
    found = att.model(X)
    term = att.loss(0)
    with att.disabled(), torch.no_grad():
        query = model.norm(model.blocks(tokens(model)))[:, 0]
    similarity = normalize(query, dim=-1) @ normalize(pool.keys, dim=-1).T
    nearest, chosen = similarity.topk(2)
    torch.testing.assert_close(term, -0.2 * nearest.sum() / len(X))
    with att.disabled():
        x = tokens(model)
        x = torch.cat([x[:, :1], pool.prompts[chosen].flatten(1, 2), x[:, 1:]], 1)
        by_hand = model.head(model.norm(model.blocks(x))[:, 1:7].mean(1))
    torch.testing.assert_close(found, by_hand)


@pytest.mark.parametrize("method", ["dtl", "l2p"])
def test_blocks_that_see_other_tokens_are_refused(method: str) -> None:
    sizes = {"img_size": 56, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2, **sizes)
    keys = {*swin.state_dict()}
    with pytest.raises(petune.AttachError, match=r"one width|one row"):
        petune.attach(swin, method)
    assert {*swin.state_dict()} == keys


COUNTS = {"mona": 2_684_928, "dyt": 1_198_860, "dtl": 43_776, "l2p": 46_080}


@pytest.mark.parametrize("method", COUNTS)
def test_parameter_counts_of_vit_base(method: str) -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=10)
        att = petune.attach(vit, method, keep_original=False)
    assert att.counts.tuned == COUNTS[method] == att.tuner.num_parameters(att.sites)


@pytest.mark.parametrize("method", ["mona:bottleneck=4", "dyt:bottleneck=4", "dtl", "l2p"])
@torch.no_grad()
def test_a_bank_runs_them_beside_another_method(method: str, tmp_path: Any) -> None:
    bank, alone = petune.AdapterBank(tiny_timm(init_values=0.3)), []
    for name, each in (("a", method), ("b", method), ("c", "adaptformer")):
        att = attached(each)
        for p in att.tuned.values():
            p.mul_(2 if name == "b" else 1)
        att.save(tmp_path / name)
        alone.append(att.model(X[:1])[0])
        bank.load(name, tmp_path / name)
    mixed = bank(X[:1].expand(3, -1, -1, -1), ["a", "b", "c"])
    torch.testing.assert_close(torch.stack([*mixed]), torch.stack(alone), atol=1e-5, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
