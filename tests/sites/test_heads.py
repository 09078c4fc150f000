"""Every head of a model trains, and what lies between backbone and heads is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import petune
from tests.sampling import sampled
from tests.sites.whole_models import (
    detr,
    distilled,
    eomt,
    mask2former,
    mask_former,
    mobilevit,
    segformer,
    super_resolution,
    swin2sr,
    upernet,
    vit,
    yolos,
)

WHOLE = [
    (yolos, 32, {"class_labels_classifier", "bbox_predictor"}),
    (segformer, 64, {"decode_head"}),
    (mobilevit, 64, {"segmentation_head"}),
    (lambda: super_resolution("pixelshuffle"), 32, {"upsample"}),
    (lambda: super_resolution("pixelshuffle_aux", "3conv"), 32, {"upsample"}),
    (lambda: super_resolution("nearest+conv"), 32, {"upsample"}),
    (lambda: super_resolution(""), 32, {"final_convolution"}),
    (upernet, 64, {"decode_head", "auxiliary_head"}),
    (distilled, 32, {"cls_classifier", "distillation_classifier"}),
    (vit, 32, {"classifier"}),
]
WITH_DECODER = [
    (eomt, 32, {"class_predictor", "mask_head", "upscale_block"}, {"query"}),
    (
        mask_former,
        64,
        {"class_predictor", "mask_embedder"},
        {"model.pixel_level_module.decoder", "model.transformer_module"},
    ),
    (
        mask2former,
        64,
        {"class_predictor", "model.transformer_module.decoder.mask_predictor"},
        {"model.pixel_level_module.decoder", "model.transformer_module.decoder.layers"},
    ),
    (detr, 64, {"class_labels_classifier", "bbox_predictor"}, {"model.encoder", "model.decoder"}),
]


def keys(model: nn.Module, paths: set[str]) -> set[str]:
    return {key for key, _ in model.named_parameters() if key.startswith(tuple(f"{path}." for path in paths))}


@pytest.mark.parametrize(("build", "size", "heads"), WHOLE)
def test_every_head_trains(build: Any, size: int, heads: set[str]) -> None:
    model = build().eval()
    wanted = keys(model, heads)
    att = petune.attach(model, "adaptformer", bottleneck=2, input_size=(3, size, size))
    assert set(att.head) == wanted
    assert {key for key, p in model.named_parameters() if p.requires_grad} == wanted | set(att.tuned)
    assert not att.sites.layers_before_head


@pytest.mark.parametrize("resi_connection", ["1conv", "3conv"])
def test_features_of_a_residual_around_all_blocks_are_no_prediction(resi_connection: str) -> None:
    model = transformers.Swin2SRModel(swin2sr("pixelshuffle", resi_connection))
    assert "head" not in petune.find_sites(model, (3, 32, 32)).parts


class ResidualStage(nn.Module):
    """Two blocks and a convolution inside a residual connection, as in SwinIR."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = {"d_model": width, "nhead": 2, "dim_feedforward": 16, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(**layer) for _ in range(2))
        self.conv = nn.Sequential(nn.Conv2d(width, 4, 3, 1, 1), nn.LeakyReLU(), nn.Conv2d(4, width, 3, 1, 1))

    def forward(self, x_BNC: Tensor) -> Tensor:
        y_BNC = x_BNC
        for block in self.blocks:
            y_BNC = block(y_BNC)
        y_BCHW = self.conv(y_BNC.mT.unflatten(2, (8, 8)))
        return y_BCHW.flatten(2).mT + x_BNC


class Restoration(nn.Module):
    """Residual stages inside a residual connection, called by the model itself, and an image that is added last."""

    image_size = 8

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, 1, 1)
        self.stages = nn.ModuleList(ResidualStage(width) for _ in range(2))
        self.body = nn.Conv2d(width, width, 3, 1, 1)
        self.before_last, self.last = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first_BCHW = self.first(x_BCHW)
        y_BNC = first_BCHW.flatten(2).mT
        for stage in self.stages:
            y_BNC = stage(y_BNC)
        y_BCHW = self.body(y_BNC.mT.unflatten(2, (8, 8))) + first_BCHW
        return x_BCHW + self.last(self.before_last(y_BCHW))


class Upsampling(nn.Module):
    """A decoder that enlarges the features of the blocks and adds those of the stem."""

    image_size = 16

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        layer = {"d_model": width, "nhead": 2, "dim_feedforward": 16, "batch_first": True, "norm_first": True}
        self.stem, self.down = nn.Conv2d(3, width, 3, 1, 1), nn.Conv2d(width, width, 2, 2)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(**layer) for _ in range(2)))
        self.up, self.out = nn.ConvTranspose2d(width, width, 2, 2), nn.Conv2d(width, 3, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        stem_BCHW = self.stem(x_BCHW)
        y_BNC = self.blocks(self.down(stem_BCHW).flatten(2).mT)
        return self.out(self.up(y_BNC.mT.unflatten(2, (8, 8))) + stem_BCHW)


@pytest.mark.parametrize(("build", "heads"), [(Restoration, {"before_last", "last"}), (Upsampling, {"up", "out"})])
def test_only_what_follows_the_residual_around_all_blocks_is_a_head(build: Any, heads: set[str]) -> None:
    model = build().eval()
    att = petune.attach(model, "linear")
    assert set(att.head) == keys(model, heads)
    assert not att.sites.layers_before_head


@pytest.mark.parametrize(("build", "size", "heads", "frozen"), sampled(WITH_DECODER, WITH_DECODER[:1].__contains__))
def test_a_decoder_that_stays_frozen_is_named(build: Any, size: int, heads: set[str], frozen: set[str]) -> None:
    model = build().eval()
    wanted = keys(model, heads)
    with pytest.warns(UserWarning, match="stay frozen") as warned:
        att = petune.attach(model, "linear", input_size=(3, size, size))
    assert set(att.head) == wanted
    assert all(path in str(warned[0].message) and path in str(att) for path in frozen)


def test_the_decoder_trains_as_a_head_if_it_is_named(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return detr().eval()

    model = fresh()
    heads = ["model.decoder", "class_labels_classifier", "bbox_predictor"]
    sites = petune.find_sites(model, (3, 64, 64), head=heads)
    assert [block.path for block in sites.blocks] == ["model.encoder.layers.0"]
    wanted = keys(model, set(heads))
    with pytest.warns(UserWarning, match="stay frozen"):
        att = petune.attach(model, "adaptformer", bottleneck=2, sites=sites)
    assert set(att.head) == wanted
    att.save(tmp_path / "adapter")
    loaded = petune.load(fresh(), tmp_path / "adapter")
    assert set(loaded.head) == wanted


class TwoBackbones(nn.Module):
    """A detector of what a text names: backbones for images and texts, a fusion, and a box for each patch."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        self.config = SimpleNamespace()
        self.text = transformers.BertModel(transformers.BertConfig(vocab_size=9, **sizes), add_pooling_layer=False)
        image = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
        self.image = transformers.ViTModel(image, add_pooling_layer=False)
        self.text_projection, self.fusion = nn.Linear(16, 16), nn.Linear(16, 16)
        self.boxes, self.scores = nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        text_BC = self.text_projection(self.text(input_ids=input_ids).last_hidden_state[:, 0])
        x_BNC = self.fusion(self.image(pixel_values=pixel_values).last_hidden_state[:, 1:] * text_BC[:, None])
        return {"boxes": self.boxes(x_BNC), "logits": self.scores(x_BNC)}


def test_what_connects_two_backbones_to_the_heads_is_named_and_neither_backbone() -> None:
    example = {"pixel_values": torch.randn(2, 3, 16, 16), "input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    sites = petune.find_sites(TwoBackbones().eval(), example=example)
    assert {path for path, _ in sites.head.named_modules} >= {"boxes", "scores"}
    assert sites.layers_before_head == ("text_projection",)
