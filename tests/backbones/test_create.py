"""Backbones by name: input sizes, options, classifiers."""

from __future__ import annotations

import pytest
import torch

import petune
from petune.backbones.create import Backbone, create_backbone, input_side
from petune.base.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [("resnet18", {}, 32), ("hiera_tiny_224", {"embed_dim": 24, "stages": (1, 1, 2, 1)}, 64)],
)
def test_the_image_size_is_the_input(name: str, options: dict[str, object], size: int) -> None:
    backbone = create_backbone(name, weights="none", num_classes=3, image_size=size, options=options)
    assert backbone.image_size == size
    with torch.no_grad():
        assert backbone.model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 3)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(ConfigError, match="wat"):
        create_backbone("resnet18", weights="none", num_classes=3, options={"wat": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": [32, 48]}, "32×48, not square"),
        ({"image_size": (32, 48)}, "32×48, not square"),
        ({"img_size": "abc"}, "img_size is 'abc'"),  # timm's TypeError is also that of a model of any size
        ({"img_size": -32}, "img_size is -32"),
        ({"img_size": None}, "img_size is None"),
        ({"img_size": 32, "patch_size": "abc"}, "patch_size is 'abc'"),
        ({"img_size": 32, "patch_size": [8, 0]}, "patch_size is"),
        ({"num_frames": "abc"}, "num_frames is 'abc'"),
        ({"num_frames": 0}, "num_frames is 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_anything_is_built(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_backbone("vit_tiny_patch16_224", weights="none", num_classes=3, options=options)
    with pytest.raises(ConfigError, match=message):
        input_side("vit_tiny_patch16_224", None, options)


def test_a_square_may_be_given_by_both_sides() -> None:
    options = {"img_size": [32, 32], "patch_size": [8, 16], "depth": 1}
    assert input_side("vit_tiny_patch16_224", None, options) == 32
    assert create_backbone("vit_tiny_patch16_224", weights="none", num_classes=3, options=options).image_size == 32


@pytest.mark.parametrize("options", [{"depth": -1}, {"num_heads": 0}, {"embed_dim": -192}])
def test_options_with_which_timm_fails_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"timm cannot build .* with {next(iter(options))}="):
        create_backbone("vit_tiny_patch16_224", weights="none", num_classes=3, options=options)


@pytest.mark.parametrize(
    ("name", "options", "width"),
    [
        ("crossvit_9_240", {"embed_dim": (8, 16), "num_heads": (2, 2), "depth": ((1, 1, 0),)}, 8 + 16),  # one a scale
        ("samvit_base_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2, "neck_chans": 16}, 16),  # inside
    ],
)
@pytest.mark.parametrize("head", ["linear", "bn_linear"])
def test_classifiers_inside_a_head(name: str, options: dict[str, object], width: int, head: str) -> None:
    backbone = create_backbone(name, weights="none", num_classes=5, options=options, head=head)
    att = petune.attach(backbone.model, "linear")
    sizes = [p.numel() for key, p in att.head.items() if key.endswith("weight")]
    assert sum(sizes) == 5 * width
    assert backbone.model.eval()(torch.randn(2, 3, *att.sites.input_size[1:])).shape == (2, 5)


@pytest.mark.parametrize(
    ("weights", "recorded", "expected"),
    [("vit", "apache-2.0", "apache-2.0"), ("vit", "unknown", None), ("vit", None, None), ("none", "mit", None)],
)
def test_the_license_of_pretrained_weights_is_known_where_timm_records_it(
    weights: str, recorded: str | None, expected: str | None
) -> None:
    model = torch.nn.Linear(1, 1)
    model.__dict__["pretrained_cfg"] = {"license": recorded}
    assert Backbone(model, "vit", "vit,img_size=32", weights, 32, None, None).license == expected
