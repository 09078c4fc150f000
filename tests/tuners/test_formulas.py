"""The smaller built-in tuners and the plugins: equal to the papers' formulas and counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

import petune
from petune.base.errors import AttachError, ConfigError
from petune.plugin_dev.tiny_models import tiny_timm
from petune.tuners.norm import is_norm
from petune.tuners.vpt import Prompt
from tests.sampling import sampled
from tests.tiny import tiny
from tests.tuned import D, X, attached

Sublayer = Callable[[nn.Module, Tensor], Tensor]


def forward(model: nn.Module, attn: Sublayer, mlp: Sublayer) -> Tensor:
    """Run timm's ViT, written out, with two sublayers to fill in."""
    x = model._pos_embed(model.patch_embed(X))
    for block in model.blocks:
        x = x + block.ls1(attn(block, block.norm1(x)))
        x = x + block.ls2(mlp(block, block.norm2(x)))
    return model.head(model.norm(x)[:, 0])


def assert_same(att: petune.Attachment, by_hand: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(att.model(X), by_hand, atol=1e-5, rtol=1e-5)
        with att.disabled():
            assert not torch.allclose(att.model(X), by_hand, atol=1e-3)


def sequential(a: nn.Module, y: Tensor) -> Tensor:
    return y + gelu(y @ a.down.weight.T + a.down.bias) @ a.up.weight.T + a.up.bias


def test_houlsby() -> None:
    att = attached("houlsby", bottleneck=5)
    assert_same(
        att,
        forward(
            att.model,
            lambda b, x: sequential(b.petune_houlsby_attn.adapter, attention(b.attn, x)),
            lambda b, x: sequential(b.petune_houlsby_mlp.adapter, plain_mlp(b.mlp, x)),
        ),
    )


def test_pfeiffer() -> None:
    att = attached("pfeiffer", bottleneck=5)
    assert_same(
        att,
        forward(
            att.model,
            lambda b, x: attention(b.attn, x),
            lambda b, x: sequential(b.petune_pfeiffer_mlp.adapter, plain_mlp(b.mlp, x)),
        ),
    )


@pytest.mark.parametrize("position", ["pre", "post"])
def test_adapter_plus(position: str) -> None:
    att = attached("pfeiffer", bottleneck=5, position=position, scale="channel")
    model = att.model
    x = model._pos_embed(model.patch_embed(X))
    for block in model.blocks:
        a = getattr(block, "petune_pfeiffer_mid" if position == "pre" else "petune_pfeiffer").adapter

        def adapted(x: Tensor, a: nn.Module = a) -> Tensor:
            return x + a.scale * (gelu(x @ a.down.weight.T + a.down.bias) @ a.up.weight.T + a.up.bias)

        x = x + block.ls1(attention(block.attn, block.norm1(x)))
        x = adapted(x) if position == "pre" else x
        normalized = nn.functional.layer_norm(x, (D,), block.norm2.weight, block.norm2.bias, block.norm2.eps)
        x = x + block.ls2(plain_mlp(block.mlp, normalized))
        x = adapted(x) if position == "post" else x
    assert_same(att, model.head(model.norm(x)[:, 0]))


def attention(attn: nn.Module, x: Tensor) -> Tensor:
    """Compute softmax attention from the weights, past all hooks."""
    q, k, v = (x @ attn.qkv.weight.T + attn.qkv.bias).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = ((q @ k.mT) * attn.head_dim**-0.5).softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(2) @ attn.proj.weight.T + attn.proj.bias


def plain_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    return gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias) @ mlp.fc2.weight.T + mlp.fc2.bias


def test_repadapter() -> None:
    att = attached("repadapter", bottleneck=4, groups=2, scale=0.7)

    def rep(a: nn.Module, x: Tensor) -> Tensor:
        hidden = x @ a.down.weight.T + a.down.bias
        halves = zip(hidden.chunk(2, -1), a.up.weight[..., 0].chunk(2), strict=True)
        return x + 0.7 * (torch.cat([h @ w.T for h, w in halves], -1) + a.up.bias)

    assert_same(
        att,
        forward(
            att.model,
            lambda b, x: attention(b.attn, rep(b.petune_repadapter_attn.adapter, x)),
            lambda b, x: plain_mlp(b.mlp, rep(b.petune_repadapter_mlp.adapter, x)),
        ),
    )


def test_fact() -> None:
    att = attached("fact", rank=3, scale=0.5)
    assert_fact(att, lambda adapter: adapter.core)
    assert att.counts.tuned == 2 * D * 3 + 2 * (3 + 1 + 4 + 4) * 3**2


def test_fact_in_tuckers_form() -> None:
    att = attached("fact", form="tk", rank=3, scale=0.5)
    c = next(p for key, p in att.tuned.items() if key.endswith("shared_core"))

    def cores(adapter: nn.Module) -> Tensor:
        """The sum over t of P_it C_t for each D×D matrix i."""
        return sum(adapter.p[..., t, None, None] * c[t] for t in range(3))

    assert_fact(att, cores)
    assert att.counts.tuned == 2 * D * 3 + 3**3 + 2 * (3 + 1 + 4 + 4) * 3


def assert_fact(att: petune.Attachment, cores: Callable[[nn.Module], Tensor]) -> None:
    """Check that the layers have the weights W + s · U Σ Vᵀ, with s = 0.5 and Σ from `cores`."""
    u, v = (next(p for k, p in att.tuned.items() if k.endswith(f"adapter.{name}")) for name in "uv")

    def changed(linear: nn.Linear, adapter: nn.Module) -> nn.Linear:
        """W + s · U Σ Vᵀ, chunk by chunk."""
        core = cores(adapter)
        out = nn.Linear(linear.in_features, linear.out_features)
        rows = [torch.cat([v @ core[i, o].T @ u.T for i in range(core.shape[0])], 1) for o in range(core.shape[1])]
        out.weight.data = linear.weight + 0.5 * torch.cat(rows)
        out.bias.data = linear.bias.clone()
        return out

    def attn(b: nn.Module, x: Tensor) -> Tensor:
        fake = type("A", (), {"num_heads": b.attn.num_heads, "head_dim": b.attn.head_dim})()
        fake.qkv = changed(b.attn.qkv, b.attn.petune_fact_qkv.adapter)
        fake.proj = changed(b.attn.proj, b.attn.petune_fact_proj.adapter)
        return attention(fake, x)

    def mlp(b: nn.Module, x: Tensor) -> Tensor:
        fake = type("M", (), {})()
        fake.fc1 = changed(b.mlp.fc1, b.mlp.petune_fact_fc1.adapter)
        fake.fc2 = changed(b.mlp.fc2, b.mlp.petune_fact_fc2.adapter)
        return plain_mlp(fake, x)

    assert_same(att, forward(att.model, attn, mlp))


def test_lst() -> None:
    att = attached("lst", reduction=4)
    model = att.model
    ladder = model.blocks[-1].petune_lst.adapter
    with torch.no_grad():
        x0 = model._pos_embed(model.patch_embed(X))
        with att.disabled():
            x1, x2 = model.blocks[0](x0), model.blocks(x0)
        rung = ladder.rungs[0]
        gate = torch.sigmoid(rung.gate)
        h = gate * ladder.first(x0) + (1 - gate) * rung.down(x1)
        h = h + rung.reduce(gelu(rung.expand(rung.norm(h))))
        assert_same(att, model.head(model.norm(x2 + ladder.up(h))[:, 0]))


def test_lst_sends_no_gradient_through_the_backbone() -> None:
    att = attached("lst")
    seen = []
    for block in att.model.blocks:  # a tensor that needs a gradient would be one inside the backbone
        block.attn.register_forward_hook(lambda m, a, y: seen.append(y.requires_grad))
    att.train()(X).sum().backward()
    assert seen == [False, False]
    att.check_gradients()


def test_ssf() -> None:
    att = attached("ssf")

    def act(holder: nn.Module, y: Tensor) -> Tensor:
        return y * holder.adapter.scale + holder.adapter.shift

    def attn(b: nn.Module, x: Tensor) -> Tensor:
        q = act(b.attn.petune_ssf_qkv, x @ b.attn.qkv.weight.T + b.attn.qkv.bias)
        q, k, v = q.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = (((q @ k.mT) * b.attn.head_dim**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return act(b.attn.petune_ssf_proj, mixed @ b.attn.proj.weight.T + b.attn.proj.bias)

    def mlp(b: nn.Module, x: Tensor) -> Tensor:
        hidden = act(b.mlp.petune_ssf_fc1, x @ b.mlp.fc1.weight.T + b.mlp.fc1.bias)
        return act(b.mlp.petune_ssf_fc2, gelu(hidden) @ b.mlp.fc2.weight.T + b.mlp.fc2.bias)

    assert_same(att, forward(att.model, attn, mlp))  # the norms are modules, so theirs are applied


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_ssf_reaches_qkv_layers_that_are_only_read(name: str) -> None:
    shape = {"img_size": 32, "patch_size": 16, "embed_dim": D, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model(name, **shape).eval()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    plain = model(x)
    att = petune.attach(model, "ssf")
    assert [key for key in att.tuned if "qkv" in key or "q_proj" in key]
    att.detach()
    assert torch.equal(model(x), plain)


def test_convpass() -> None:
    att = attached("convpass", hidden_dim=4, scale=0.5)

    def bypass(a: nn.Module, x: Tensor) -> Tensor:
        h = gelu(x @ a.down.weight.T + a.down.bias)
        patches = nn.functional.conv2d(h[:, 1:].mT.reshape(2, 4, 4, 4), a.conv.weight, a.conv.bias, padding=1)
        cls = h[:, :1] @ a.conv.weight[:, :, 1, 1].T + a.conv.bias
        mixed = torch.cat([cls, patches.flatten(2).mT], 1)
        return 0.5 * (gelu(mixed) @ a.up.weight.T + a.up.bias)

    assert_same(
        att,
        forward(
            att.model,
            lambda b, x: attention(b.attn, x) + bypass(b.petune_convpass_attn.adapter, x),
            lambda b, x: plain_mlp(b.mlp, x) + bypass(b.petune_convpass_mlp.adapter, x),
        ),
    )


def test_l2sp_is_the_distance_from_the_start() -> None:
    att = attached("l2sp", alpha=2.0, beta=4.0)  # `attached` has changed all values
    model, start = att.model, tiny_timm(init_values=0.3)
    pairs = zip(model.named_parameters(), start.parameters(), strict=True)
    distance = sum((p - q).square().sum() for (name, p), q in pairs if not name.startswith("head"))
    size = sum(p.square().sum() for p in model.head.parameters())
    torch.testing.assert_close(att.loss(0), distance + 2 * size)


def test_l2sp_ignores_other_adapters() -> None:
    model = tiny_timm()
    below = petune.attach(model, "adaptformer", bottleneck=2)
    att = petune.attach(model, "l2sp", alpha=2.0, beta=0.0)
    with torch.no_grad():
        for p in below.tuned.values():
            p.add_(1.0)
    assert att.loss(0) == 0.0


def test_bitfit_norm_and_partial_train_the_right_parameters() -> None:
    assert {key.rpartition(".")[2] for key in attached("bitfit").tuned} == {"bias"}
    assert not any("head" in key for key in attached("bitfit").tuned)
    norms = {key.rpartition(".")[0].rpartition(".")[2] for key in attached("norm").tuned}
    assert norms == {"norm1", "norm2", "norm"}
    deep = petune.attach(tiny_timm(depth=12), "partial", num_blocks=1)
    assert {key.split(".")[0] + "." + key.split(".")[1] for key in deep.tuned} == {
        "blocks.11", "norm.weight", "norm.bias",
    }  # fmt: skip
    beit = timm.create_model("beit_base_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=2,
                             num_classes=3)  # fmt: skip
    tuned = petune.attach(beit, "bitfit").tuned
    assert any(key.endswith("q_bias") for key in tuned)
    assert not any("table" in key for key in tuned)


COUNTS = {  # by the papers' formulas
    "adaptformer": 1_189_632,
    "bitfit": 102_912,
    "convpass": 327_552,
    "dora": 1_179_648 + 12 * 9 * 768,
    "fact": 61_440,
    "fact:form=tk": 30_976,
    "houlsby": 2_379_264,
    "lora": 1_179_648,
    "norm": 38_400,
    "partial": 7_089_408,
    "pfeiffer": 1_189_632,
    "pfeiffer:position=post,scale=channel,bottleneck=8": 165_984,
    "repadapter": 239_808,
    "sct": 111_744,
    "ssf": 204_288,
    "vpt": 92_160,
}


@pytest.mark.parametrize("method", sampled(sorted(COUNTS), {"adaptformer", "vpt"}.__contains__))
def test_parameter_counts_of_vit_base(method: str) -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=10)
        att = petune.attach(vit, method, keep_original=False)
    assert att.counts.tuned == COUNTS[method]
    assert att.tuner.num_parameters(att.sites) in (None, COUNTS[method])


def test_lst_refuses_blocks_of_several_widths() -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=8, depths=(1, 1), num_heads=(1, 2), num_classes=2
    )
    with pytest.raises(AttachError, match="one width"):
        petune.attach(swin, "lst")


def test_prompt_dropout_differs_per_image() -> None:
    torch.manual_seed(0)
    prompt = Prompt(4, 8, 1.0, 0.5)
    x = torch.zeros(3, 5, 8)
    kept = prompt(x) != 0
    assert kept.shape == (3, 4, 8)
    assert not torch.equal(kept[0], kept[1])
    assert prompt.eval()(x).shape == (1, 4, 8)


def test_prompt_dropout_works_in_windows() -> None:
    size = {"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 2)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **size)
    att = petune.attach(model, "vpt", dropout=0.5)
    att.train()
    assert model(torch.randn(2, 3, 56, 56)).shape == (2, 3)


def test_repadapter_groups_must_divide_bottleneck_and_width() -> None:
    with pytest.raises(ConfigError, match="bottleneck=1 is no multiple of groups=2"):
        petune.attach(tiny(), "repadapter", bottleneck=1, groups=2)
    with pytest.raises(AttachError, match="groups=5 does not divide the width"):
        petune.attach(tiny(), "repadapter", bottleneck=5, groups=5)


def test_norms_with_an_activation_train() -> None:
    from timm.layers import BatchNormAct2d, GroupNormAct, LayerNormAct2d

    assert all(is_norm(m) for m in (BatchNormAct2d(4), GroupNormAct(4, num_groups=2), LayerNormAct2d(4)))
    assert not is_norm(torch.nn.Sequential(torch.nn.LayerNorm(4)))

    class RMSNorm(torch.nn.Module):  # hand-written, its epsilon a constant
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

    assert is_norm(RMSNorm())


def test_fact_warns_about_layers_that_it_skips() -> None:
    odd = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, embed_dim=24, num_heads=2,
                            num_classes=3, mlp_ratio=2.5)  # fmt: skip
    with pytest.warns(UserWarning, match="mlp"):
        assert petune.attach(odd, "fact").counts.tuned > 0


class PostNormViT(nn.Module):
    """Blocks as torch builds them by default: each sum is normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, D, 8, 8)
        layer = nn.TransformerEncoderLayer(D, 4, 2 * D, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(D, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.encoder(self.patch_embed(x_BCHW).flatten(2).transpose(1, 2)).mean(1))


def test_adaptformer_is_part_of_a_sum_that_is_normalized() -> None:
    model = PostNormViT().eval()
    att = petune.attach(model, "adaptformer", bottleneck=2, input_size=tuple(X.shape[1:]))
    for parameter in att.tuned.values():
        nn.init.normal_(parameter)
    down, bias, up, up_bias = zip(*[list(att.tuned.values())[i : i + 4] for i in (0, 4)], strict=True)
    with torch.no_grad(), att.disabled():
        x = model.patch_embed(X).flatten(2).transpose(1, 2)
        for i, layer in enumerate(model.encoder.layers):
            x = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
            a = 0.1 * (torch.relu(x @ down[i].T + bias[i]) @ up[i].T + up_bias[i])
            x = layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))) + a)
        by_hand = model.head(x.mean(1))
    assert_same(att, by_hand)
