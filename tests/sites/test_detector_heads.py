"""Detectors whose heads share parameters or are trained by a loss of their own: what stays frozen is named."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from torch import nn

import petune
from tests.sites import branching_blocks as models


def d_fine() -> transformers.DFineForObjectDetection:
    backbone = transformers.HGNetV2Config(
        embedding_size=8,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 16, 32, 32],
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 32],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 32, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DFineConfig(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[16, 32, 32],
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        decoder_layers=2,
        num_queries=8,
        num_denoising=0,
        hidden_expansion=0.5,
        num_labels=3,
        eval_size=None,
    )
    return transformers.DFineForObjectDetection(config).eval()


def test_every_frozen_layer_beside_the_heads_is_named_and_no_alias_of_a_head() -> None:
    model = d_fine()
    sites = petune.find_sites(model, (3, 64, 64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        petune.attach(model, "linear", sites=sites)
    assert {"model.enc_score_head", "model.enc_bbox_head"} <= {path for path, _ in sites.head.named_modules}
    named = str(caught[0].message).partition("method trains them: ")[2].partition(". If")[0].split(", ")
    assert "model.decoder.pre_bbox_head" in named
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    parameters = dict(model.named_parameters(remove_duplicate=False))  # of a module, or a parameter beside modules
    for path in named:
        assert any(id(p) in frozen for name, p in parameters.items() if f"{name}.".startswith(f"{path}.")), path


@pytest.mark.parametrize("name", ["OwlViT", "Owlv2"])
def test_the_text_tower_of_a_detector_is_no_head(name: str) -> None:
    """The model returns the tower's tokens next to its boxes, and they are wider than the numbers of the words."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 40, "max_position_embeddings": 8}
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=32
    )
    model = getattr(transformers, f"{name}ForObjectDetection")(config).eval()
    words = torch.tensor([[1, 5, 9, 2], [1, 7, 3, 2]])
    example = {"input_ids": words, "attention_mask": torch.ones_like(words), "pixel_values": torch.randn(1, 3, 32, 32)}
    sites = petune.find_sites(model, example=example)
    heads = {"class_head", "box_head", "objectness_head"} & dict(model.named_children()).keys()
    assert {path for path, _ in sites.head.named_modules} == heads
    assert [len(tower.blocks) for tower in sites.towers] == [2, 2]
    with pytest.warns(UserWarning, match="text_projection"):
        petune.attach(model, "linear", sites=sites)
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == heads


class Detector(models.Queries):
    """Returns boxes for each query by a layer that is built as the last one of its MLPs is."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2 * models.D, models.D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches, x = self.stem(x).flatten(2).mT, self.queries.expand(len(x), -1, -1)
        for block in self.blocks:
            x = block(x, patches)
        return self.head(torch.cat([self.norm(x), x], -1))


def test_a_layer_in_a_block_is_no_head_though_it_is_built_as_one() -> None:
    sites = petune.find_sites(Detector().eval())
    assert [path for path, _ in sites.head.named_modules] == ["head"]
