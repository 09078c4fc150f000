"""`petune inspect`: the sites of a backbone, and what a method would train there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from petune.cli.dry_run import method_facts
from petune.cli.options import Json
from petune.cli.settings import Settings, configured
from petune.cli.terminal import clean, print_data, print_facts, print_json, print_status

if TYPE_CHECKING:
    from petune.sites.site import Block, Site
    from petune.sites.sites import Sites

FLAGS = ("method", "backbone", "dataset", "image-size", "patch-size", "head")
DEFAULTS = {"method": "none: the backbone alone"}


@configured(only=FLAGS, defaults=DEFAULTS)
def inspect(settings: Settings, *, json: Json = False) -> None:
    """Show the parts of a backbone that petune can edit, and what a method would train.

    The backbone is built without its weights, and nothing is trained.
    """
    from petune.runner.preview import preview_backbone, preview_data, preview_method
    from petune.runner.run_config import RunConfig

    values = settings.values()
    config = RunConfig.build(values, settings.source)
    backbone = preview_backbone(config)
    method = preview_method(config.method, backbone) if "method" in values else None
    if json:
        print_json(
            {
                "backbone": backbone.full_name,
                "weights_loaded": False,
                "forward_flops": backbone.forward_flops,
                "sites": sites_data(backbone.sites),
                "method": preview_data(method) if method else None,
            }
        )
        return
    print_status(f"{backbone.full_name}: structure only, weights were not loaded")
    print_data(clean(str(backbone.sites)))
    if method is not None:
        print_data("")
        print_facts(method_facts(method, backbone))


def sites_data(sites: Sites) -> dict[str, Any]:
    """Return the sites as plain data."""
    return {
        "model": sites.model,
        "input_size": sites.input_size,
        "grid_size": sites.grid_size,
        "embed_dim": sites.embed_dim,
        "num_prefix_tokens": sites.num_prefix_tokens,
        "patch_embed": _site_data(sites.parts.get("patch_embed")),
        "blocks": [_block_data(block) for block in sites.blocks],
        "norm": _site_data(sites.parts.get("norm")),
        "head": _site_data(sites.parts.get("head")),
    }


def _block_data(block: Block) -> dict[str, Any]:
    from petune.sites.site import ROLES

    parts = {role: _site_data(block.parts.get(role)) for role in ROLES}
    return {**(_site_data(block) or {}), **parts}


def _site_data(site: Site | None) -> dict[str, Any] | None:
    return None if site is None else {"where": site.where, "layout": site.layout, "dim": site.dim}
