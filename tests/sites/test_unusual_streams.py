"""Streams around norms of unusual kinds, around both branches together, and with scales after the MLP."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import petune
from tests.tiny import randomised, tiny


class DynamicTanh(nn.Module):
    """tanh(αx)γ + β, of transformers without normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.gamma, self.beta = (
            nn.Parameter(torch.ones(1)),
            nn.Parameter(torch.ones(24)),
            nn.Parameter(torch.zeros(24)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.gamma + self.beta


class DynamicErf(DynamicTanh):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(self.alpha * x) * self.gamma + self.beta


class TransposedBatchNorm(nn.Module):
    """BatchNorm over (B, D, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(24)

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = self.inner(x.transpose(1, 2))
        return normalized.transpose(1, 2)


class Block(nn.Module):
    """A timm block that computes something else of its modules."""

    def __init__(self, inner: nn.Module, compute: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = inner.norm1, inner.attn, inner.norm2, inner.mlp
        self.compute, self.scale = compute, nn.Parameter(torch.full((24,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def model_of(compute: Callable[[Block, Tensor], Tensor], norm: Callable[[], nn.Module] | None = None) -> nn.Module:
    model = tiny()
    model.blocks = nn.Sequential(*(Block(block, compute) for block in model.blocks))
    for block in model.blocks if norm else ():
        block.norm1, block.norm2 = norm(), norm()
    return model.eval()


def pre_norm(block: Block, x: Tensor) -> Tensor:
    x = x + block.attn(block.norm1(x))
    return x + block.mlp(block.norm2(x))


def one_residual(block: Block, x: Tensor) -> Tensor:
    return x + block.mlp(block.norm2(block.attn(block.norm1(x))))


def post_norm(block: Block, x: Tensor) -> Tensor:
    x = block.norm1(x + block.attn(x))
    return block.norm2(x + block.mlp(x))


def post_norm_scaled(block: Block, x: Tensor) -> Tensor:
    x = block.norm1(x + block.scale * block.attn(x))
    return block.norm2(x + block.scale * block.mlp(x))


def post_norm_in_float64(block: Block, x: Tensor) -> Tensor:
    x = block.norm1(x + block.attn(x))
    return block.norm2((x.double() + block.mlp(x).double()).float())


@pytest.mark.parametrize("norm", [DynamicTanh, DynamicErf, TransposedBatchNorm])
def test_an_adapter_reads_the_stream_before_any_kind_of_norm(norm: Callable[[], nn.Module]) -> None:
    model = model_of(pre_norm, norm)
    att = randomised(petune.attach(model, "adaptformer", bottleneck=4, blocks=[0]))
    block, x = model.blocks[0], torch.randn(2, 17, 24)
    with torch.no_grad():
        output = block(x)
        with att.disabled():
            mid = x + block.attn(block.norm1(x))
            torch.testing.assert_close(output, block(x) + block.petune_adaptformer.adapter(mid))


@pytest.mark.parametrize("norm", [nn.LayerNorm, DynamicTanh, TransposedBatchNorm])
def test_an_adapter_joins_the_sum_before_any_kind_of_last_norm(norm: Callable[..., nn.Module]) -> None:
    model = model_of(post_norm, lambda: norm(24) if norm is nn.LayerNorm else norm())
    att = randomised(petune.attach(model, "adaptformer", bottleneck=4, blocks=[0]))
    block, x = model.blocks[0], torch.randn(2, 17, 24)
    with torch.no_grad():
        output = block(x)
        with att.disabled():
            mid = block.norm1(x + block.attn(x))
            total = mid + block.mlp(mid) + block.petune_adaptformer_mlp.adapter(mid)
            torch.testing.assert_close(output, block.norm2(total))


@pytest.mark.parametrize("norm", [DynamicTanh, DynamicErf])
def test_squashing_norms_are_norms(norm: Callable[[], nn.Module]) -> None:
    att = petune.attach(model_of(pre_norm, norm), "norm", train_head=False)
    expected = {
        f"blocks.{i}.{name}.{key}"
        for i in range(2)
        for name in ("norm1", "norm2")
        for key in ("alpha", "gamma", "beta")
    }
    assert set(att.tuned) == expected | {"norm.weight", "norm.bias"}


def test_a_squashing_final_norm_is_as_wide_as_its_tokens() -> None:
    model = model_of(pre_norm, DynamicTanh)
    model.norm = DynamicTanh()
    sites = petune.find_sites(model)
    assert (sites.norm.path, sites.norm.dim) == ("norm", 24)
    att = petune.attach(model, "ssf")
    assert {p.numel() for key, p in att.tuned.items() if key.startswith("petune_ssf_norm")} == {24}


def test_one_sum_around_attention_and_mlp_has_no_stream_between_them() -> None:
    model = model_of(one_residual)
    assert all("mid" not in block.parts for block in petune.find_sites(model).blocks)
    with pytest.raises(petune.SiteNotFound, match="adaptformer:input=norm"):
        petune.attach(model, "adaptformer")


@pytest.mark.parametrize("compute", [post_norm, post_norm_in_float64])
def test_a_post_norm_block_adds_the_adapter_to_the_sum(compute: Callable[[Block, Tensor], Tensor]) -> None:
    att = randomised(petune.attach(model_of(compute), "adaptformer", bottleneck=4))
    assert len(att.sites.blocks) == 2


@pytest.mark.parametrize("method", ["adaptformer", "dyt"])
def test_an_adapter_is_refused_where_a_scale_would_hide_it(method: str) -> None:
    with pytest.raises(petune.AttachError, match=r"blocks\.0\) of .* multiplies its MLP's output"):
        petune.attach(model_of(post_norm_scaled), method)
    petune.attach(model_of(post_norm_scaled), "adaptformer", variant="paddle_study")


def test_sites_have_an_input_size_already() -> None:
    model = tiny()
    with pytest.raises(petune.UsageError, match="input_size"):
        petune.attach(model, "linear", sites=petune.find_sites(model), input_size=(3, 16, 16))


class Conformer(nn.Module):
    """Half an MLP, an attention, convolutions over tokens, half an MLP, a norm (arXiv:2005.08100)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.ffn2 = inner.norm1, inner.attn, inner.norm2, inner.mlp
        self.norm0, self.ffn1 = nn.LayerNorm(24), nn.Sequential(nn.Linear(24, 30), nn.SiLU(), nn.Linear(30, 24))
        self.conv = nn.ModuleList(
            [nn.Conv1d(24, 48, 1), nn.Conv1d(48, 48, 3, padding=1, groups=48), nn.Conv1d(48, 24, 1)]
        )
        self.norm_conv, self.final = nn.LayerNorm(24), nn.LayerNorm(24)

    def convolve(self, x: Tensor) -> Tensor:
        y = self.norm_conv(x).mT
        for conv in self.conv:
            y = conv(y)
        return y.mT

    def before_last(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.ffn1(self.norm0(x))
        x = x + self.attn(self.norm1(x))
        return x + self.convolve(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before_last(x)
        return self.final(x + 0.5 * self.ffn2(self.norm2(x)))


def test_a_conformer_block_ends_with_its_norm_and_its_last_mlp_gets_the_adapter() -> None:
    model = tiny()
    model.blocks = nn.Sequential(*(Conformer(block) for block in model.blocks))
    model.eval()
    blocks = petune.find_sites(model).blocks
    assert [(b.path, b.is_module, b.mid.where) for b in blocks] == [
        (f"blocks.{i}", True, f"input of blocks.{i}.norm2") for i in range(2)
    ]
    att = randomised(petune.attach(model, "adaptformer", bottleneck=4, blocks=[0]))
    block, x = model.blocks[0], torch.randn(2, 17, 24)
    with torch.no_grad():
        output = block(x)
        with att.disabled():
            mid = block.before_last(x)
            change = block.ffn2(block.norm2(mid)) + block.petune_adaptformer_mlp.adapter(mid)
            torch.testing.assert_close(output, block.final(mid + 0.5 * change))
    att.detach()
    assert all(key.startswith(("blocks.1.", "norm.")) for key in petune.attach(model, "partial").tuned)
