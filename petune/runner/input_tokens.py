"""Warn of an image size that makes many more tokens than the backbone was made for."""

from __future__ import annotations

import contextlib
import math

import torch

from petune.backbones.create import create_backbone
from petune.backbones.names import calls_user_code
from petune.base.errors import PetuneError
from petune.runner.provenance import forward_flops
from petune.runner.run_config import RunConfig
from petune.sites.find import find_sites
from petune.sites.sites import Sites

MANY = 8
"""Times as many tokens as the backbone was made for; fine-tuning at a higher resolution uses two to five times."""


def warn_of_tokens(config: RunConfig, sites: Sites) -> str:
    """Return a warning with the costs and what to do if `image_size` makes many more tokens; else an empty string.

    Args:
        config: The run.
        sites: Of its backbone.
    """
    if config.image_size is None or sites.grid_size is None or calls_user_code(config.backbone):
        return ""
    with contextlib.suppress(PetuneError):  # a backbone without a size of its own
        own, own_flops = _at_size(config, None, None)
        if own.grid_size is None or math.prod(sites.grid_size) <= MANY * math.prod(own.grid_size):
            return ""
        _, flops = _at_size(config, config.image_size, config.patch_size)
        patch, rest = divmod(config.image_size, own.grid_size[0])
        with_patch = "" if rest else f", or use patch_size={patch}"
        return (
            f"image_size={config.image_size} makes {math.prod(sites.grid_size):,} tokens of each image, where "
            f"{config.backbone} was made for {math.prod(own.grid_size):,}: {flops / 1e9:.2f} instead of "
            f"{own_flops / 1e9:.2f} GFLOPs per image. Leave image_size out to scale images of any size to "
            f"{own.input_size[-1]}×{own.input_size[-1]}{with_patch}"
        )
    return ""


def _at_size(config: RunConfig, image_size: int | None, patch_size: int | None) -> tuple[Sites, int]:
    """Return the sites of the backbone at a size, and the FLOPs of its forward pass of one image."""
    with torch.device("meta"):
        model = create_backbone(
            config.backbone,
            weights="none",
            num_classes=2,
            image_size=image_size,
            patch_size=patch_size,
            options=config.backbone_options,
        ).model
        sites = find_sites(model)
        return sites, forward_flops(model, sites.input_spec)
