"""What a method would train on a backbone, found without weights, data or training."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from petune.base.text import format_percent
from petune.cli.terminal import format_count, format_flops

if TYPE_CHECKING:
    from petune.injector.attachment import Attachment
    from petune.injector.tuner import Recipe
    from petune.runner.run_config import RunConfig
    from petune.sites.site import Sites


@dataclass(frozen=True)
class Structure:
    """A backbone without weights.

    Attributes:
        full_name: As a run would report it.
        sites: What petune sees.
        forward_flops: Of one image.
    """

    full_name: str
    sites: Sites
    forward_flops: int


@dataclass(frozen=True)
class Plan:
    """What a method would train there; counts of parameters, percentages as in a result."""

    method: str
    tuned: int
    head: int
    total: int
    percent_of_total: float
    percent_of_backbone: float
    forward_flops: int
    recipe: str
    warnings: tuple[str, ...]

    def facts(self, bare_flops: int) -> list[tuple[str, str]]:
        """Names and values to print."""
        more = format_percent(100 * (self.forward_flops / bare_flops - 1))
        shares = (self.percent_of_total, "all parameters"), (self.percent_of_backbone, "backbone and head")
        of = ", ".join(f"{format_percent(share, 3)} of {whole}" for share, whole in shares)
        return [
            ("method", self.method),
            ("tuned", f"{format_count(self.tuned)}  (with the head {of})"),
            ("head", format_count(self.head)),
            ("all parameters", format_count(self.total)),
            ("forward", f"{format_flops(self.forward_flops)} an image"),
            ("without the method", f"{format_flops(bare_flops)} (the method adds {more})"),
            ("recipe", self.recipe),
            *(("warning", text) for text in self.warnings),
        ]


def structure_of(config: RunConfig) -> tuple[Structure, Any]:
    """The backbone's structure and its model, on the meta device: shapes only, nothing is read."""
    import torch

    from petune.backbones.create import create_backbone
    from petune.data.lookup import count_classes
    from petune.runner.provenance import forward_flops
    from petune.sites.find import find_sites

    with torch.device("meta"):
        backbone = create_backbone(
            config.backbone,
            weights="none",
            num_classes=count_classes(config.dataset),
            image_size=config.image_size,
            patch_size=config.patch_size,
            options=config.backbone_options,
            head=config.head,
        )
        sites = find_sites(backbone.model)
        cost = forward_flops(backbone.model, sites.input_size)
    return Structure(backbone.full_name, sites, cost), backbone.model


def plan_of(method: str, model: Any, sites: Sites, recipe: Recipe | None = None) -> Plan:
    """Attach `method` to the meta model, count, and detach it again.

    Args:
        method: Options in place allowed.
        model: On the meta device, as `structure_of` makes it.
        sites: Its sites.
        recipe: What is taken instead of the method's own.
    """
    import torch

    from petune.injector.attach import attach
    from petune.injector.registry import build_tuner
    from petune.runner.provenance import forward_flops

    tuner = build_tuner(method)
    with torch.device("meta"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attachment: Attachment = attach(model, tuner)
        cost = forward_flops(model, sites.input_size)
        counts = attachment.counts
        attachment.detach()
    return Plan(
        method,
        counts.tuned,
        counts.head,
        counts.total,
        counts.percent_of_total,
        counts.percent_of_backbone,
        cost,
        _words(recipe or tuner.recipe),
        tuple(dict.fromkeys(str(w.message) for w in caught)),
    )


def _words(recipe: Recipe) -> str:
    return f"{recipe.optimizer}, learning rate {recipe.lr:g}, weight decay {recipe.weight_decay:g}"
