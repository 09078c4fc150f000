"""The tokens before the patches are class token and registers, however the rows of tokens are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import petune

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


class OnFrames(nn.Module):
    """A model of videos, on an image as a clip that stands still."""

    def __init__(self, model: nn.Module, axis: int, num_frames: int) -> None:
        super().__init__()
        self.model = model
        self.axis = axis
        self.num_frames = num_frames

    def forward(self, x: Tensor) -> Any:
        return self.model(torch.stack([x] * self.num_frames, self.axis))


def timesformer(side: int, num_frames: int) -> nn.Module:
    config = transformers.TimesformerConfig(**SMALL, image_size=side, patch_size=8, num_frames=num_frames, num_labels=3)
    return OnFrames(transformers.TimesformerForVideoClassification(config), 1, num_frames)


def pixtral(side: int) -> nn.Module:
    return transformers.PixtralVisionModel(transformers.PixtralVisionConfig(**SMALL, image_size=side, patch_size=16))


def crossvit(side: int) -> nn.Module:
    model: nn.Module = timm.create_model("crossvit_tiny_240", img_size=side, num_classes=3)
    return model


def dinov2(side: int) -> nn.Module:
    shape = {**SMALL, "image_size": side, "patch_size": 14, "num_register_tokens": 4}
    return transformers.Dinov2WithRegistersForImageClassification(transformers.Dinov2WithRegistersConfig(**shape))


def vit(side: int) -> nn.Module:
    return transformers.ViTModel(
        transformers.ViTConfig(**SMALL, image_size=side, patch_size=8), add_pooling_layer=False
    )


@pytest.mark.parametrize(
    ("build", "side", "grid", "num_prefix_tokens"),
    [
        (lambda: timesformer(32, 2), 32, (4, 4), 1),
        (lambda: timesformer(56, 2), 56, (7, 7), 1),
        (lambda: timesformer(32, 5), 32, (4, 4), 1),
        (lambda: pixtral(64), 64, (4, 4), 0),
        (lambda: crossvit(240), 240, (20, 20), 1),
        (lambda: crossvit(120), 120, (10, 10), 1),
        (lambda: dinov2(56), 56, (4, 4), 5),
        (lambda: vit(32), 32, (4, 4), 1),
    ],
    ids=["2 frames", "2 larger frames", "5 frames", "pixtral", "crossvit", "crossvit, small", "registers", "class"],
)
def test_prefix_tokens_do_not_depend_on_the_image(
    build: Callable[[], nn.Module], side: int, grid: tuple[int, int], num_prefix_tokens: int
) -> None:
    sites = petune.find_sites(build(), (3, side, side))
    assert (sites.grid_size, sites.num_prefix_tokens) == (grid, num_prefix_tokens)


class Stem(nn.Module):
    """A ViT whose rows hold tokens that no grid explains."""

    def __init__(self, tokens: Callable[[Tensor], Tensor], num_fixed: int) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.fixed = nn.Parameter(torch.randn(1, num_fixed, 16))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
        self.head = nn.Linear(16, 3)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(len(x), -1, 12)
        z = self.tokens(self.embed(patches))
        z = torch.cat([self.fixed.expand(len(x), -1, -1), z], 1)
        for block in self.blocks:
            z = block(z)
        return self.head(z.mean(1))


@pytest.mark.parametrize("num_fixed", [0, 3])
def test_tokens_of_a_pyramid_are_not_prefix_tokens(num_fixed: int) -> None:
    model = Stem(lambda z: torch.cat([z, z[:, :5]], 1), num_fixed)
    sites = petune.find_sites(model, (3, 8, 8))
    assert sites.num_prefix_tokens == num_fixed
    assert sites.grid_size is None


def test_on_the_meta_device_the_count_is_that_of_the_grid() -> None:
    with torch.device("meta"):
        model = Stem(lambda z: z, 3)
    sites = petune.find_sites(model, (3, 8, 8))
    assert (sites.grid_size, sites.num_prefix_tokens) == ((4, 4), 3)


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_are_refused_where_a_row_holds_a_batch(deep: bool) -> None:
    model = pixtral(64)
    before = dict(model.state_dict())
    with pytest.raises(petune.AttachError, match="one row"):
        petune.attach(model, "vpt", deep=deep, train_head=False)
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_are_refused_where_a_block_cuts_its_row_into_frames(deep: bool) -> None:
    with pytest.raises(petune.AttachError, match="cannot take prompts"):
        petune.attach(timesformer(32, 2), "vpt", deep=deep, input_size=(3, 32, 32))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*CrossVit")  # its fusion layers are in no block
def test_prompts_in_both_branches_come_after_the_class_token() -> None:
    model = crossvit(120)
    att = petune.attach(model, "vpt", num_prompts=3)
    x = torch.randn(3, 3, 120, 120)
    with torch.no_grad():
        torch.testing.assert_close(model(x[[2, 0, 1]]), model(x)[[2, 0, 1]], atol=1e-4, rtol=1e-4)
        tuned = model(x)
        with att.disabled():
            assert not torch.equal(model(x), tuned)


class TimeFirstBlock(nn.Module):
    """Attends within each frame; takes (time, batch, patches, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(24), timm.layers.Attention(24, 2), nn.LayerNorm(24)
        self.mlp = timm.layers.Mlp(24, 48)

    def forward(self, x_TBND: Tensor) -> Tensor:
        x_TBND = x_TBND + self.attn(self.norm1(x_TBND).flatten(0, 1)).view(x_TBND.shape)
        return x_TBND + self.mlp(self.norm2(x_TBND))


class TimeFirst(nn.Module):
    def __init__(self, *, reads_values: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 24, 8, 8), nn.Linear(24, 3)
        self.blocks = nn.Sequential(TimeFirstBlock(), TimeFirstBlock())
        self.reads_values = reads_values  # then it does not run on the meta device

    def forward(self, video: Tensor) -> Tensor:
        x = torch.stack([self.stem(frame).flatten(2).mT for frame in video.unbind(2)])
        factor = float(video.isfinite().all()) if self.reads_values else 1.0
        logits: Tensor = self.head(factor * self.blocks(x).mean((0, 2)))
        return logits


@pytest.mark.parametrize("num_frames", [2, 4])
@pytest.mark.parametrize("reads_values", [False, True])
def test_the_batch_is_no_part_of_the_grid(num_frames: int, reads_values: bool) -> None:
    sites = petune.find_sites(TimeFirst(reads_values=reads_values), example=torch.zeros(2, 3, num_frames, 32, 32))
    assert len(sites.blocks) == 2
    assert sites.grid_size is None


def mobilevit(side: int) -> nn.Module:
    config = transformers.MobileViTV2Config(image_size=side, width_multiplier=0.5, n_attn_blocks=[1, 1, 1])
    return transformers.MobileViTV2ForImageClassification(config)


class WindowBlock(nn.Module):
    """Attends in each window of a (batch, windows, places, width) tensor, or in each row of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(24), timm.layers.Attention(24, 2), nn.LayerNorm(24)
        self.mlp = timm.layers.Mlp(24, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x).flatten(0, 1)).view(x.shape)
        return x + self.mlp(self.norm2(x))


class OnWindows(nn.Module):
    """16 windows of 16 tokens, as many as rows and columns of the map; or the map, put together from groups."""

    def __init__(self, *, cuts: bool) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 24, 2, 2), nn.LayerNorm(24), nn.Linear(24, 3)
        self.positions = nn.Parameter(torch.zeros(1, 16, 16, 24))
        self.blocks = nn.Sequential(WindowBlock(), WindowBlock())
        self.cuts = cuts

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).permute(0, 2, 3, 1)
        if self.cuts:
            x = x.reshape(-1, 4, 4, 4, 4, 24).transpose(2, 3).reshape(-1, 16, 16, 24)
        else:
            x = x.unflatten(-1, (3, 8)).flip(-1).reshape(-1, 16, 16, 24)
        logits: Tensor = self.head(self.blocks(self.norm(x + self.positions)).mean((1, 2)))
        return logits


@pytest.mark.parametrize(
    ("build", "side", "grid"),
    [
        (lambda: timm.create_model("nest_tiny", img_size=128), 128, None),
        (lambda: timm.create_model("nest_tiny", img_size=64), 64, None),
        (lambda: timm.create_model("mobilevitv2_050"), 64, None),
        (lambda: mobilevit(64), 64, None),
        (lambda: OnWindows(cuts=True), 32, None),
        (lambda: OnWindows(cuts=False), 32, (16, 16)),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56), 56, (14, 14)),
    ],
    ids=["nest", "nest, square", "mobilevitv2", "transformers", "cut", "not cut", "swin"],
)
def test_windows_are_no_rows_and_columns(
    build: Callable[[], nn.Module], side: int, grid: tuple[int, int] | None
) -> None:
    with torch.device("meta"):
        model = build()
    sites = petune.find_sites(model, (3, side, side))
    assert sites.blocks
    assert sites.grid_size == grid


def test_methods_do_not_convolve_across_windows() -> None:
    model = OnWindows(cuts=True)
    before = model.state_dict().keys()
    for method in ("mona", "convpass", "dtl"):
        with pytest.raises(petune.AttachError, match="grid of patches"):
            petune.attach(model, method, input_size=(3, 32, 32))
    assert model.state_dict().keys() == before
    assert petune.attach(model, "dtl", input_size=(3, 32, 32), kernel=0).tuned
