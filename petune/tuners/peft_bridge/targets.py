"""Choose the layers that PEFT wraps, from the model's sites, and the options that must fit their shapes."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

import petune
from petune.tuners.peft_bridge.checks import refuse_bypassed
from petune.tuners.peft_bridge.options import PARTS, PeftConfig, completed, defaults_of
from petune.tuners.peft_bridge.parts import Targets, options_of_parts, original_path, parts_of_attentions

MUST_DIVIDE = {
    "c3a": "block_size",
    "vblora": "vector_length",
    "road": "group_size",
    "oft": "oft_block_size",
    "miss": "r",
}
"""Types with an option that must divide both sides of every layer."""


def choose_targets(edit: petune.Edit, config: PeftConfig) -> Targets:
    """Return the layers of every block that the options ask for.

    Raises:
        AttachError: The model has no such layer, or calls none of them.
    """
    if config.type == "ln_tuning":
        return Targets(_layer_norms(edit), [])
    if config.targets in PARTS:
        return parts_of_attentions(edit, config)
    attentions = _fused_attentions(edit, config)
    return Targets(_linear_layers(edit, config, required=not attentions), attentions)


def options_for(edit: petune.Edit, config: PeftConfig, targets: Targets) -> dict[str, Any]:
    """Return the options of PEFT's config: the targets, the user's options, and what must fit the layers' shapes."""
    options: dict[str, Any] = {
        "target_modules": _exact_names([original_path(site) for site in targets.layers], edit.model),
        **completed(config.type, config.peft_options),
        **_fitting_options(edit, config, targets.layers),
        **config.peft_options,
        **options_of_parts(config, targets),
    }
    if targets.attentions:
        parameters = [f"{original_path(site)}.in_proj_weight" for site in targets.attentions]
        options["target_parameters"] = parameters
    return options


def _sites_of(edit: petune.Edit, config: PeftConfig) -> list[petune.Site]:
    """Return the sites whose layers are wrapped; a block without a separate attention or MLP is one site."""
    blocks = edit.sites.require_blocks()
    if config.targets != "all":
        return [site for block in blocks for site in block.sublayers if site.role == config.targets]
    sites: list[petune.Site] = []
    for block in blocks:
        sites += block.branches if {site.role for site in block.branches} == {"attn", "mlp"} else [block]
    return sites


def _layer_norms(edit: petune.Edit) -> list[petune.Site]:
    blocks = edit.sites.require_blocks()
    final = dict.fromkeys(norm for tower in edit.sites.towers for norm in tower.norms)
    chosen = {block.index for block in blocks}
    paths = {path for path, index in edit.sites.layers.norms_between.items() if index in chosen}
    between = [site for module in edit.backbone() if paths and (site := edit.site(module)).path in paths]
    norms = [*(norm for block in blocks for norm in block.norms), *between, *final]
    known = [site for site in norms if isinstance(site.module, nn.LayerNorm)]
    trainable = [site for site in known if site.module.weight is not None]  # the last norm of Qwen3 has none
    if not trainable:
        raise petune.AttachError(
            f"ln_tuning needs torch's LayerNorm, but {edit.sites.model} has others in its blocks. Use norm"
        )
    _name_other_norms(edit, norms, {site.module for site in trainable})
    return trainable


def _name_other_norms(edit: petune.Edit, norms: Sequence[petune.Site], trained: set[nn.Module]) -> None:
    """Warn about norms of blocks that ln_tuning leaves: of other classes, and at no site, as those of q and k."""
    inside = {m for block in edit.sites.blocks for own in block.own_modules for m in own.modules()}
    found = {m for m, _ in edit.sites.layers.norms if m in inside} | {site.module for site in norms}
    left = [m for m in edit.backbone() if m in found - trained and any(True for _ in m.parameters(recurse=False))]
    if left:
        warnings.warn(
            f"ln_tuning leaves {len(left)} of the norms of {edit.sites.model} as they are: "
            f"{_shown([edit.site(m).path for m in left])}. It wraps torch's LayerNorm before or after an attention or "
            "MLP; norm trains all",
            stacklevel=2,
        )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _fused_attentions(edit: petune.Edit, config: PeftConfig) -> list[petune.Site]:
    """Return torch's attentions with q, k and v in one parameter, which only PEFT's plain LoRA can change."""
    options = config.peft_options
    if config.type != "lora" or options.get("use_dora") or options.get("lora_dropout"):
        return []
    inside = [m for site in _sites_of(edit, config) for m in site.enter.modules()]
    fused = [m for m in inside if isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None]
    called = edit.called(fused)
    return [edit.site(m) for m in fused if m in called]


def _linear_layers(edit: petune.Edit, config: PeftConfig, *, required: bool) -> list[petune.Site]:
    """Return the linear layers to wrap; warn about those that the model reads without calling them."""
    sites = _sites_of(edit, config)
    for site in sites:
        edit.use_qkv_module(site)
    is_lora = config.type == "lora"
    inside = {site: edit.linear_layers(site, pointwise=is_lora, transposed=is_lora) for site in sites}
    layers = [layer for site, every in inside.items() for layer in every if _takes_tokens(edit, layer, site.dim)]
    layers = list({id(layer.module): layer for layer in layers}.values())
    uncalled = [layer for site in sites for layer in edit.uncalled_linears(site)]
    refuse_bypassed(edit.model, config.type, [layer.module for layer in uncalled])
    model, names = edit.sites.model, ", ".join(dict.fromkeys(layer.path for layer in uncalled[:3]))
    _name_others(edit, config, sites)
    _name_sites_without_layers(edit, config, inside, uncalled)
    _name_bare_weights(edit, config, inside)
    if required and not layers:
        raise petune.AttachError(
            f"{config.type} needs linear layers that are called, but {model} calls none in {config.targets}"
            f"{f': it reads the weights of {names} itself' if uncalled else ''}. Use targets=mlp, or adaptformer"
        )
    if uncalled:
        _name_uncalled(edit, config, uncalled, len(uncalled) + len(layers))
    return layers


def _name_uncalled(edit: petune.Edit, config: PeftConfig, uncalled: Sequence[petune.Site], num_layers: int) -> None:
    """Warn about layers that get nothing: the model reads their weights itself, or does not use them."""
    method = "dora" if config.peft_options.get("use_dora") else config.type
    used = set(edit.used(p for layer in uncalled for p in layer.module.parameters()))
    read = [layer for layer in uncalled if not used.isdisjoint(layer.module.parameters())]
    unused = [layer for layer in uncalled if layer not in read]
    does, without = "reads the weights of", "without calling them"
    for layers, verb, how in ((read, does, without), (unused, "does not use", "for a black image in eval mode")):
        names = ", ".join(dict.fromkeys(layer.path for layer in layers[:3]))
        if layers:
            warnings.warn(
                f"{edit.sites.model} {verb} {len(layers)} of {num_layers} linear layers {how}, such as {names}: they "
                f"get no {method}, the others do",
                stacklevel=3,
            )


def _takes_tokens(edit: petune.Edit, layer: petune.Site, dim: int) -> bool:
    """Return whether a layer reads the input, or has a side as wide as the stream, as for learned queries (DETR).

    The small network that makes a table of positions (Swin-V2) does neither.
    """
    reads = original_path(layer) not in edit.sites.layers.of_constants
    return reads or dim in cast(nn.Linear, layer.module).weight.shape


def _name_sites_without_layers(
    edit: petune.Edit,
    config: PeftConfig,
    inside: Mapping[petune.Site, Sequence[petune.Site]],
    uncalled: Sequence[petune.Site],
) -> None:
    """Warn about attentions and MLPs that get nothing: a network makes their weights, or they hold these themselves."""
    alone = {layer.path for layer in uncalled}
    bare = [
        (site, every)
        for site, every in inside.items()
        if site.role in {"attn", "mlp"}
        and edit.sites.first_owner(site) is None
        and not any(_takes_tokens(edit, layer, site.dim) for layer in every)
        and not any(f"{path}.".startswith(f"{site.path}.") for path in alone)
        and not any(isinstance(m, nn.MultiheadAttention) for m in site.enter.modules())
    ]
    if not bare or len(bare) == len(inside):
        return
    shown = _shown([site.where for site, _ in bare])
    makers = [layer.path for _, every in bare for layer in every]
    reason = f"{makers[0]} reads no tokens and only makes their weights" if makers else "they call none"
    warnings.warn(
        f"{len(bare)} attentions and MLPs of {edit.sites.model} have no linear layer for tokens ({reason}), so they "
        f"get no {config.type}: {shown}. PEFT's option target_modules names other layers; adaptformer acts beside an "
        "MLP of any kind",
        stacklevel=2,
    )


def _name_bare_weights(
    edit: petune.Edit, config: PeftConfig, inside: Mapping[petune.Site, Sequence[petune.Site]]
) -> None:
    """Warn about matrices that an attention or MLP holds itself, next to linear layers that it calls."""
    mixed = {site: every for site, every in inside.items() if every and site.role in {"attn", "mlp"}}
    holders = {m for site in mixed for end in site.modules for m in end.modules()}
    holders -= {m for every in mixed.values() for layer in every for m in layer.module.modules()}
    holders = {m for m in holders if not isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    own = {id(p) for m in holders for p in m.parameters(recurse=False) if p.ndim >= 2}
    keys = [key for key, p in edit.model.named_parameters() if id(p) in own]
    known = edit.sites.layers.in_blocks
    left = [key for key in keys if key in known or key.rpartition(".")[0] in known]
    if left:
        warnings.warn(
            f"{len(left)} weights of attentions and MLPs of {edit.sites.model} are parameters that a module multiplies "
            f"with itself, not linear layers, so they get no {config.type}: {_shown(left)}",
            stacklevel=2,
        )


def _name_others(edit: petune.Edit, config: PeftConfig, sites: list[petune.Site]) -> None:
    """Warn about linear layers of the blocks' width that are outside attention and MLP, and so stay as they are."""
    if config.targets != "all" or config.type != "lora":
        return
    inside = {layer.module for site in sites for layer in edit.linear_layers(site)}
    named = [site for block in edit.sites.blocks for site in block.split_mlps]  # `attach` names these
    inside |= {m for site in named for end in site.modules for m in end.modules()}
    blocks = [block for block in edit.sites.blocks if block.is_module]
    every = [(block.dim, layer) for block in blocks for layer in edit.linear_layers(block)]
    others = [layer.path for dim, layer in every if layer.module not in inside and _has_width(layer.module, dim)]
    if others:
        warnings.warn(
            f"{len(others)} linear layers in blocks of {edit.sites.model} are outside attention and MLP and stay as "
            f"they are: {_shown(others)}. PEFT's option target_modules names other layers",
            stacklevel=2,
        )


def _has_width(layer: nn.Module, dim: int) -> bool:
    """Return whether a layer takes and returns tokens of a width, or several: not the projection between two stages."""
    return all(side % dim == 0 for side in cast(nn.Linear, layer).weight.shape)


def _fitting_options(edit: petune.Edit, config: PeftConfig, layers: list[petune.Site]) -> dict[str, Any]:
    """Return defaults that fit the layers' shapes, for types whose own defaults depend on them."""
    kind = config.type
    sides = [side for site in layers for side in cast(nn.Linear, site.module).weight.shape]
    if kind in MUST_DIVIDE and not (kind == "oft" and config.peft_options.get("r")):
        option = MUST_DIVIDE[kind]
        return {option: math.gcd(defaults_of(kind)[option], *sides)}
    if kind == "shira":
        return {"r": min(defaults_of(kind)["r"], min(sides) // 4)}
    if kind == "waveft":
        return {"n_frequency": min(defaults_of(kind)["n_frequency"], min(sides) ** 2)}
    if kind == "lora" and layers and not any(isinstance(site.module, nn.Linear | nn.Conv2d) for site in layers):
        return {"fan_in_fan_out": True}  # transformers' Conv1D
    if kind == "ia3":
        wrapped = {original_path(site) for site in layers}
        return {"feedforward_modules": [path for path in _last_of_mlps(edit) if path in wrapped]}
    return {}


def _last_of_mlps(edit: petune.Edit) -> list[str]:
    """Return the path of the last linear layer of each MLP, once for MLPs that share it."""
    last: dict[nn.Module, str] = {}
    for mlp in [site for block in edit.sites.blocks for site in block.branches if site.role == "mlp"]:
        inside = {m for module in mlp.modules for m in module.modules()}
        layers = edit.linear_layers(mlp)  # without a layer that an earlier block has called
        if layers and not inside & last.keys():
            last[layers[-1].module] = original_path(layers[-1])
    return list(last.values())


def _exact_names(paths: list[str], model: nn.Module) -> list[str] | str:
    """Return the paths as PEFT takes them: it compares ends, so that where one path ends another it needs a regex."""
    endings = tuple(f".{path}" for path in paths)
    if any(name.endswith(endings) for name, _ in model.named_modules()):
        return "|".join(re.escape(path) for path in paths)
    return paths
