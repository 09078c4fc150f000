"""Backbones by name: sizes that models are built for, and sizes that any convolution takes."""

from __future__ import annotations

import pytest
import torch

from petune.backbones import create_backbone
from petune.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [("resnet18", {}, 32), ("hiera_tiny_224", {"embed_dim": 24, "stages": (1, 1, 2, 1)}, 64)],
)
def test_the_image_size_is_the_input(name: str, options: dict[str, object], size: int) -> None:
    backbone = create_backbone(name, weights="none", num_classes=3, image_size=size, options=options)
    assert backbone.image_size == size
    with torch.no_grad():
        assert backbone.model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 3)


def test_an_option_that_no_model_takes_is_named() -> None:
    with pytest.raises(ConfigError, match=r"resnet18.*cannot be built with wat=1"):
        create_backbone("resnet18", weights="none", num_classes=3, options={"wat": 1})
