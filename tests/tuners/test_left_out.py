"""What a method leaves out is named, and what belongs to no layer is not trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petune
from tests.tiny import X, tiny

D = 24


class Made(nn.Module):
    """An MLP whose weights a network makes."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.up, self.down = nn.Parameter(torch.randn(5)), nn.Linear(5, 2 * D * D), nn.Linear(5, 2 * D * D)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(x, self.up(self.code).view(2 * D, D)))
        return F.linear(hidden, self.down(self.code).view(D, 2 * D))


class Bare(nn.Module):
    """An MLP that holds its matrices itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2 * D, D)), nn.Parameter(torch.randn(D, 2 * D))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, self.up)), self.down)


@pytest.mark.parametrize(
    ("make", "reason"), [(Made, r"mlp\.up reads no tokens and only makes their weights"), (Bare, "they call none")]
)
def test_lora_names_the_mlps_that_it_leaves_out(make: Callable[[], nn.Module], reason: str) -> None:
    model = tiny()
    for block in model.blocks:
        block.mlp = make()
    with pytest.warns(UserWarning, match=rf"2 attentions and MLPs .*{reason}.* get no lora: blocks\.0\.mlp, blocks\.1"):
        att = petune.attach(model, "lora")
    assert len(att.tuned) == 2 * 2 * 2  # A and B of qkv and proj in two blocks
    att.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        petune.attach(model, "lora", targets="attn").detach()
        petune.attach(model, "adaptformer")


class Latent(nn.Module):
    """An attention that makes keys and values by way of few channels, which neither side of a layer shows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.down, self.up, self.out = (nn.Linear(*sides) for sides in ((D, D), (D, 10), (10, 2 * D), (D, D)))
        self.positions = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, x: Tensor, **masks: object) -> Tensor:
        keys, values = self.up(self.down(x)).chunk(2, -1)
        table = self.positions(torch.stack(torch.meshgrid(*[torch.arange(17.0)] * 2, indexing="ij"), -1))
        logits: Tensor = self.q(x) @ keys.mT * D**-0.5 + table[..., 0]
        return self.out(logits.softmax(-1) @ values)


@pytest.mark.parametrize("targets", ["all", "attn"])
def test_lora_changes_layers_of_any_width_that_read_tokens(targets: str) -> None:
    model = tiny()
    for block in model.blocks:
        block.attn = Latent()
    att = petune.attach(model.eval(), "lora", targets=targets)
    inside = {key.split(".")[3] for key in att.tuned if key.startswith("blocks.1.attn")}
    assert inside == {"q", "down", "up", "out"}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_ln_tuning_names_the_norms_that_it_leaves_out() -> None:
    model = tiny(qk_norm=True)
    model.blocks[0].norm2 = nn.RMSNorm(24)
    with pytest.warns(
        UserWarning,
        match=r"leaves 5 of the norms .* are: blocks\.0\.attn\.q_norm, blocks\.0\.attn\.k_norm, blocks\.0\.norm2",
    ):
        att = petune.attach(model, "peft:ln_tuning")
    assert {key.rpartition(".ln_tuning_layers")[0] for key in att.tuned if "attn" in key} == set()


def test_bitfit_does_not_train_the_numbers_of_a_contrastive_loss() -> None:
    class Siglip(nn.Module):
        image_size = 16

        def __init__(self) -> None:
            super().__init__()
            self.tower = tiny()
            self.tower.reset_classifier(0)
            self.logit_scale, self.logit_bias = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
            self.register_buffer("texts", torch.randn(3, D))

        def forward(self, x: Tensor) -> Tensor:
            return self.tower(x) @ self.texts.T * self.logit_scale.exp() + self.logit_bias

    tuned = petune.attach(Siglip(), "bitfit", train_head=False).tuned
    assert tuned.keys() == {f"tower.{key}" for key in petune.attach(tiny(), "bitfit").tuned}


def test_bitfit_trains_biases_by_any_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.b1 = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.zeros(D))
            self.g, self.b2, self.gate = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D)), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(F.layer_norm(F.linear(x, self.weight, self.b1), (D,), self.g, bias=self.b2))

    model = tiny()
    for block in model.blocks:
        block.mlp = Named()
    tuned = petune.attach(model, "bitfit").tuned
    assert {key for key in tuned if ".mlp." in key} == {
        f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in ("b1", "b2", "gate.bias")
    }


class Merge(nn.Module):
    """Merge 2 × 2 tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1]) // 2
        windows = x.view(len(x), side, 2, side, 2, -1).transpose(2, 3)
        return self.reduction(windows.reshape(len(x), side * side, -1))


class AttentionOnly(nn.Module):
    """A block without an MLP."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn = inner.norm1, inner.attn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


def pyramid(make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return a ViT whose stages see 16, 4 and 1 tokens."""
    model = tiny(depth=3, class_token=False, global_pool="avg")
    first, second, last = map(make, model.blocks)
    model.blocks = nn.Sequential(first, Merge(D), second, Merge(D), last)
    return model.eval()


@pytest.mark.parametrize("make", [AttentionOnly, lambda block: block])
def test_a_last_block_that_sees_a_single_token_is_a_block(make: Callable[[nn.Module], nn.Module]) -> None:
    model = pyramid(make)
    assert [block.path for block in petune.find_sites(model).blocks] == ["blocks.0", "blocks.2", "blocks.4"]
    before = model(X)
    att = petune.attach(model, "vpt")
    assert att.counts.tuned == 3 * 10 * D
    assert not torch.allclose(model(X), before)


def test_lst_names_the_block_that_sees_other_tokens() -> None:
    with pytest.raises(petune.AttachError, match=r"\(1, 16, 24\) enters its first block and \(1, 4, 24\) its block 1"):
        petune.attach(pyramid(lambda block: block), "lst")


class Widening(nn.Module):
    """A block whose MLP makes tokens twice as wide, and whose sum is no sum of the stream."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = inner.norm1, inner.attn, inner.norm2
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, 2 * D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return torch.cat([x, x], -1) + self.mlp(self.norm2(x))


def test_input_norm_is_advised_only_where_it_works() -> None:
    model = tiny(depth=1)
    model.blocks, model.norm, model.head = Widening(model.blocks[0]), nn.LayerNorm(2 * D), nn.Linear(2 * D, 5)
    with pytest.raises(petune.SiteNotFound) as error:
        petune.attach(model, "adaptformer")
    assert "input=norm" not in str(error.value)
    with pytest.raises(petune.AttachError, match="takes tokens of width 24 and returns 48, so no adapter"):
        petune.attach(model, "adaptformer", input="norm")


def test_layers_inside_the_stages_of_a_named_classifier_are_no_further_heads() -> None:
    class Stage(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block, self.mix = block, nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.block(x))

    class TwoHeads(nn.Module):
        image_size = 16

        def __init__(self) -> None:
            super().__init__()
            self.vit = tiny()
            self.stages = nn.Sequential(*map(Stage, self.vit.blocks))
            self.vit.blocks, self.head = nn.Identity(), nn.ModuleList([nn.Linear(D, 3), nn.Linear(D, 3)])

        def get_classifier(self) -> nn.Module:
            return self.head

        def forward(self, x: Tensor) -> Tensor:
            x = self.stages(self.vit.forward_features(x))
            return self.head[0](x[:, 0]) + self.head[1](x.mean(1))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert petune.attach(TwoHeads().eval(), "linear").counts.head == 2 * (D + 1) * 3


def test_ssf_leaves_norms_of_tokens_behind_channels_alone() -> None:
    class ByChannel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(D)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.mT).mT

    model = tiny()
    for block in model.blocks:
        block.norm1 = ByChannel()
    with pytest.warns(UserWarning, match=r"ssf leaves 2 of 12 layers as they are: blocks\.\*\.norm1\.norm"):
        att = petune.attach(model, "ssf")
    assert att.counts.tuned == petune.attach(tiny(), "ssf").counts.tuned - 2 * 2 * D


class OwnQueries(nn.Module):
    """An attention that multiplies with its matrix of queries itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Parameter(torch.randn(D, D)), nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x: Tensor, **masks: object) -> Tensor:
        keys, values = self.kv(x).chunk(2, -1)
        return self.out(F.scaled_dot_product_attention(x @ self.q, keys, values))


@pytest.mark.parametrize("targets", ["all", "attn"])
def test_lora_names_bare_weights_next_to_linear_layers(targets: str) -> None:
    model = tiny()
    for block in model.blocks:
        block.attn = OwnQueries()
    with pytest.warns(UserWarning, match=r"2 weights .* get no lora: blocks\.0\.attn\.q, blocks\.1\.attn\.q"):
        petune.attach(model, "lora", targets=targets)
