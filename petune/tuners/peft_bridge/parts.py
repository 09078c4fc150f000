"""The layers to wrap, also where only q, k or v of an attention is to change and one layer makes all three.

PEFT changes whole layers. A change of some of the rows is a LoRA whose B is zero in the others. Each part has its own
r columns of B, so that it is the LoRA that a layer of its own would have; PEFT reads the larger rank from the file.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

import petune
from petune.tuners.peft_bridge.options import PeftConfig


@dataclass(frozen=True)
class Targets:
    """The layers to wrap.

    Attributes:
        layers: Linear layers; norms for ln_tuning.
        attentions: Attentions of torch that hold q, k and v as one parameter, `in_proj_weight`.
        rows: By path of a layer of which only some outputs are to change, first and last of the rows of each part.
    """

    layers: list[petune.Site]
    attentions: list[petune.Site]
    rows: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def paths(self) -> list[str]:
        """Return the path of every module to wrap."""
        return [original_path(site) for site in (*self.layers, *self.attentions)]


def original_path(site: petune.Site) -> str:
    """Return the layer's path without the layers that other adapters of PEFT have put around it."""
    return site.path.replace(".base_layer", "")


def parts_of_attentions(edit: petune.Edit, config: PeftConfig) -> Targets:
    """Return the layers that make what `targets` names of every attention.

    Raises:
        AttachError: The type changes whole layers only, and one layer makes more than that.
    """
    wanted = tuple("qkv") if config.targets == "qkv" else tuple(config.targets.split(","))
    targets = Targets([], [])
    for block in edit.sites.require_blocks():
        edit.use_qkv_module(block.attn)
        attention = edit.attention(block)
        if attention.q is None or not hasattr(attention.q.module, "weight"):
            site = _torch_attention(edit, config, block)
            targets.attentions.append(site)
            if config.targets != "qkv":
                targets.rows[original_path(site)] = [_rows_of(site, name) for name in wanted]
            continue
        parts = [site for name in wanted if (site := getattr(attention, name)) is not None]
        for layer in {site.module: edit.site(site.module) for site in parts}.values():
            rows = [site.part for site in parts if site.module is layer.module and site.part is not None]
            targets.layers.append(layer)
            if rows and sum(stop - start for start, stop in rows) < _num_outputs(layer.module):
                targets.rows[original_path(layer)] = rows
    if targets.rows:
        _refuse_whole_layers(config, targets)
    return targets


def options_of_parts(config: PeftConfig, targets: Targets) -> dict[str, Any]:
    """Return the options of PEFT's config that give each part of a layer r columns, with the scale of one."""
    if not targets.rows:
        return {}
    parameters = {original_path(site): ".in_proj_weight" for site in targets.attentions}
    options = config.peft_options
    r, alpha = options.get("r", 8), options.get("lora_alpha", 8)
    counts = {re.escape(path + parameters.get(path, "")): len(parts) for path, parts in targets.rows.items()}
    factor = math.sqrt if options.get("use_rslora") else float  # the scale is alpha / sqrt(rank), or alpha / rank
    return {
        "rank_pattern": {path: n * r for path, n in counts.items()},
        "alpha_pattern": {path: factor(n) * alpha for path, n in counts.items()},
    }


def mask_of_rows(weight: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """Return which entries of a B (outputs, rank, …) train: for each part its rows, in columns of its own."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    r = weight.shape[1] // len(rows)
    for number, (start, stop) in enumerate(rows):
        mask[start:stop, number * r : (number + 1) * r] = True
    return mask


def _torch_attention(edit: petune.Edit, config: PeftConfig, block: petune.Block) -> petune.Site:
    """Return torch's own attention, whose q, k and v are one parameter."""
    options = config.peft_options
    is_plain = config.type == "lora" and not options.get("use_dora") and not options.get("lora_dropout")
    inside = block.attn.enter.modules()
    found = [m for m in inside if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None]
    if not is_plain or len(found) != 1:
        raise petune.AttachError(
            f"{edit.sites.model} has torch's nn.MultiheadAttention, which reads the weights of q, k and v without "
            "calling a layer. Use lora without dropout, whose targets may be qkv, q, k or v"
        )
    return edit.site(found[0])


def _rows_of(attention: petune.Site, name: str) -> tuple[int, int]:
    """Return first and last of the rows of q, k or v in the one parameter of torch's attention."""
    width = cast(nn.MultiheadAttention, attention.module).embed_dim
    start = "qkv".index(name) * width
    return start, start + width


def _refuse_whole_layers(config: PeftConfig, targets: Targets) -> None:
    options = config.peft_options
    name = "dora" if options.get("use_dora") else config.type
    given = next((key for key in ("rank_pattern", "alpha_pattern", "lora_bias") if options.get(key)), None)
    if name != "lora" or given:
        path, rows = next(iter(targets.rows.items()))
        what = f"{given} goes with whole layers" if given else f"{name} changes whole layers"
        raise petune.AttachError(
            f"{what}, but {path} makes more than {config.targets} ({len(rows)} of its parts). Use targets=qkv, or lora"
            f"{f' without {given}' if given else ''}"
        )


def _num_outputs(layer: nn.Module) -> int:
    weight = cast(nn.Linear, layer).weight
    return int(weight.shape[0] if isinstance(layer, nn.Linear | nn.Conv2d) else weight.shape[1])
