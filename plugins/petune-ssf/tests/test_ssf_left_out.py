"""SSF names every layer that it leaves as it is, of any class, and nothing that is no layer."""

import re
import warnings

import pytest
import timm
import torch
from timm.layers import LayerScale
from torch import nn
from torch.nn import functional as F

import petune

D = 24


def vit(**options):
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": D, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **{**shape, **options}).eval()


def left_out(model, **options):
    """Return the names in the warning of SSF; none without one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        petune.attach(model, "ssf", **options).detach()
    found = [re.fullmatch(r"ssf leaves \d+ of \d+ layers as they are: (.*)", str(w.message)) for w in caught]
    return {name for match in found for name in match[1].split(", ")} if found else set()


class GammaNorm(nn.Module):
    """The RMSNorm of vit-pytorch."""

    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * self.gamma


class PowerNorm(GammaNorm):
    """The RMSNorm of Gemma 4, which writes the root as a power."""

    def forward(self, x):
        return (x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)) * self.gamma


class Experimental(nn.Module):
    """A layer of a kind of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def forward(self, x):
        return torch.sin(x * self.a) + x * self.b


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(D, D, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0]


class Added(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 17, D))

    def forward(self, x):
        return x + self.table


class Numbered(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.rows = nn.Parameter(torch.zeros(3, D)), nn.Embedding(17, D)

    def forward(self, x):
        return x + self.table[torch.arange(17) % 3] + self.rows(torch.arange(17))


class Further(nn.Module):
    """A branch with a further module before or after it."""

    def __init__(self, inner, first=None, last=None):
        super().__init__()
        self.inner, self.first, self.last = inner, first or nn.Identity(), last or nn.Identity()

    def forward(self, x, *args, **kwargs):
        return self.last(self.inner(self.first(x), *args, **kwargs))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: GammaNorm(D), "blocks.*.mlp.last"),
        (lambda: PowerNorm(D), "blocks.*.mlp.last"),
        (Experimental, "blocks.*.mlp.last"),
        (Recurrent, "blocks.*.mlp.last.gru"),
        (lambda: nn.PReLU(), "blocks.*.mlp.last"),
    ],
)
def test_layers_of_any_class_are_named(make, name):
    model = vit()
    for block in model.blocks:
        block.mlp = Further(block.mlp, last=make())
    assert left_out(model) == {name}


def test_norms_of_queries_and_keys_are_named_by_any_class():
    model = vit()
    for block in model.blocks:
        block.attn.q_norm, block.attn.k_norm = GammaNorm(12), GammaNorm(12)
    assert left_out(model) == {"blocks.*.attn.q_norm", "blocks.*.attn.k_norm"}
    assert left_out(model, blocks="last:1") == {"blocks.*.attn.q_norm", "blocks.*.attn.k_norm"}


class Functional(nn.Module):
    """A block whose norms and last layer are functions of its own parameters."""

    def __init__(self, block):
        super().__init__()
        self.attn, self.mlp = block.attn, block.mlp
        self.w1, self.b1 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))
        self.w2, self.mix = nn.Parameter(torch.ones(D)), nn.Parameter(torch.eye(D))
        self.scale, self.token = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(1, 1, D))

    def forward(self, x):
        x = x + self.scale * self.attn(F.layer_norm(x, (D,), self.w1, self.b1)) + self.token
        return x + self.mlp(F.rms_norm(x, (D,), self.w2)) @ self.mix


def test_parameters_that_a_block_gives_to_a_function_are_named():
    model = vit()
    model.blocks = nn.Sequential(*map(Functional, model.blocks))
    assert left_out(model) == {f"blocks.*.{name}" for name in ("w1", "b1", "w2", "mix")}


@pytest.mark.parametrize("make", [lambda: LayerScale(D), lambda: LayerScale(D, inplace=True), Added, Numbered])
def test_factors_tables_and_embeddings_are_not_named(make):
    model = vit()
    for block in model.blocks:
        block.mlp = Further(block.mlp, last=make())
    assert left_out(model) == set()


def test_layers_outside_blocks_are_named():
    model = vit()
    model.blocks[1] = Further(model.blocks[1], first=nn.LayerNorm(D))
    pooled = vit(global_pool="map", class_token=False)
    assert left_out(model) == {"blocks.*.first"}
    assert left_out(pooled, train_head=False) == {"attn_pool"}
    assert left_out(vit(pre_norm=True)) == set()


def test_a_layer_without_an_effect_is_not_named():
    model = vit()
    unused = Further(nn.Identity(), last=nn.LayerNorm(D))
    model.blocks.register_forward_hook(lambda module, args, output: (unused(output), output)[1])
    model.unused = unused
    assert left_out(model) == set()
