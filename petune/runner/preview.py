"""Preview what a method would train on a backbone, computed on the meta device: no weights, no data, no training."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from petune.backbones.create import create_backbone, input_frames
from petune.backbones.input_channels import RGB_CHANNELS
from petune.data.lookup import dataset_frames, dataset_target
from petune.injector.attach import attach
from petune.injector.counts import Counts
from petune.injector.registry import build_tuner
from petune.injector.tuner import Recipe
from petune.runner.input_tokens import warn_of_tokens
from petune.runner.prepare import with_head_of
from petune.runner.provenance import forward_flops
from petune.runner.run_config import RunConfig
from petune.runner.run_preprocess import check_channels
from petune.sites.find import find_sites
from petune.sites.sites import Sites
from petune.training.task_registry import task_for


@dataclass(frozen=True)
class BackbonePreview:
    """A backbone without weights.

    Attributes:
        model: The model, on the meta device.
        full_name: The name, as a result reports it.
        sites: Its sites.
        forward_flops: FLOPs of the forward pass of one image or clip.
        warning: About its size, if there is one.
    """

    model: nn.Module
    full_name: str
    sites: Sites
    forward_flops: int
    warning: str = ""

    @property
    def sample(self) -> str:
        """`image`, or `clip` if the backbone takes several frames."""
        return "clip" if len(self.sites.input_size) == len(("frames", "channels", "height", "width")) else "image"


@dataclass(frozen=True)
class MethodPreview:
    """Parameters that a method would train.

    Attributes:
        method: As given, with its options.
        counts: Numbers of parameters.
        forward_flops: FLOPs of the forward pass of one image, with the method.
        recipe: What it would train with.
        warnings: What attaching warned about.
        blocks: Numbers of the blocks that its option `blocks` chooses; None for all.
    """

    method: str
    counts: Counts
    forward_flops: int
    recipe: Recipe
    warnings: tuple[str, ...]
    blocks: tuple[int, ...] | None = None


def preview_backbone(config: RunConfig) -> BackbonePreview:
    """Build the backbone of a run without its weights."""
    task = task_for(config.task, dataset_target(config.dataset, config.data_dir), config.dataset)
    frames = input_frames(config.backbone, config.backbone_options)
    num_frames = dataset_frames(config.dataset, config.data_dir, frames)
    with torch.device("meta"):
        backbone = create_backbone(
            config.backbone,
            weights="none",
            num_classes=task.num_outputs(),
            image_size=config.image_size,
            patch_size=config.patch_size,
            options=config.options_to_build,
            head=config.head,
            channels=None if config.channels == RGB_CHANNELS else config.channels,
            num_frames=num_frames,
        )
        backbone = with_head_of(task, backbone, seed=0)
        sites = find_sites(backbone.model)
        check_channels(sites.input_size[-3], config.channels or RGB_CHANNELS)
        flops = forward_flops(backbone.model, sites.input_spec)
    return BackbonePreview(backbone.model, backbone.full_name, sites, flops, warn_of_tokens(config, sites))


def preview_method(method: str, backbone: BackbonePreview, recipe: Recipe | None = None) -> MethodPreview:
    """Attach a method to the backbone, count, and detach it again.

    Args:
        method: The method, with options if needed.
        backbone: As `preview_backbone` returns it.
        recipe: The recipe to show; None shows the method's own.

    Raises:
        AttachError: The method cannot be attached to this backbone.
    """
    tuner = build_tuner(method)
    with torch.device("meta"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attachment = attach(backbone.model, tuner)
        flops = forward_flops(backbone.model, backbone.sites.input_spec)
        counts, sites = attachment.counts, attachment.sites
        attachment.detach()
    messages = tuple(dict.fromkeys(str(w.message) for w in caught))
    blocks = tuple(block.index for block in sites.blocks) if sites.chosen_from is not None else None
    return MethodPreview(method, counts, flops, recipe or tuner.recipe, messages, blocks)


def preview_data(preview: MethodPreview) -> dict[str, Any]:
    """Return a preview as plain data, for JSON."""
    counts = preview.counts
    return {
        "method": preview.method,
        "blocks": preview.blocks,
        "tuned": counts.tuned,
        "head": counts.head,
        "total": counts.total,
        "percent_of_total": counts.percent_of_total,
        "percent_of_backbone": counts.percent_of_backbone,
        "forward_flops": preview.forward_flops,
        "recipe": describe_recipe(preview.recipe),
        "warnings": list(preview.warnings),
    }


def describe_recipe(recipe: Recipe) -> str:
    """Return a recipe in words."""
    scaled = " · batch / 128" if recipe.scales_lr else ""
    return f"{recipe.optimizer}, learning rate {recipe.lr:g}{scaled}, weight decay {recipe.weight_decay:g}"
