"""`petune inspect`: the places of a backbone, and what a method would train there."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from petune.cli.options import Json, Settings, configured
from petune.cli.structure import plan_of, structure_of
from petune.cli.terminal import clean, print_data, print_facts, print_json, print_status

if TYPE_CHECKING:
    from petune.sites.site import Site, Sites

FLAGS = ("method", "backbone", "dataset", "image-size", "patch-size", "head")
DEFAULTS = {"method": "none: the backbone alone"}


@configured(only=FLAGS, defaults=DEFAULTS)
def inspect(settings: Settings, *, json: Json = False) -> None:
    """Show a backbone's places and what a method would train.

    The backbone is built without its weights, and nothing is trained.
    """
    from petune.runner.run_config import RunConfig

    values = settings.values()
    config = RunConfig.build(values, settings.source)
    structure, model = structure_of(config)
    plan = plan_of(config.method, model, structure.sites) if "method" in values else None
    if json:
        found = {
            "backbone": structure.full_name,
            "weights_loaded": False,
            "forward_flops": structure.forward_flops,
            "sites": sites_data(structure.sites),
            "method": asdict(plan) if plan else None,
        }
        print_json(found)
        return
    print_status(f"{structure.full_name}: structure only, weights were not loaded")
    print_data(clean(str(structure.sites)))
    if plan is not None:
        print_data("")
        print_facts(plan.facts(structure.forward_flops))


def sites_data(sites: Sites) -> dict[str, Any]:
    """The sites as plain data."""
    from petune.sites.site import ROLES

    return {
        "model": sites.model,
        "input_size": sites.input_size,
        "grid_size": sites.grid_size,
        "embed_dim": sites.embed_dim,
        "num_prefix_tokens": sites.num_prefix_tokens,
        "patch_embed": _site(sites.parts.get("patch_embed")),
        "blocks": [{**(_site(b) or {}), **{role: _site(b.parts.get(role)) for role in ROLES}} for b in sites.blocks],
        "norm": _site(sites.parts.get("norm")),
        "head": _site(sites.parts.get("head")),
    }


def _site(site: Site | None) -> dict[str, Any] | None:
    return None if site is None else {"where": site.where, "layout": site.layout, "dim": site.dim}
