"""From a name to a model that is ready to be tuned: aliases, timm names, input size, weights, a fresh head."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from petune.backbones.other_libraries import build_other_library, is_other_library
from petune.backbones.weights import Weights, bundled, find_weights, load_into, read_weights
from petune.base.arguments import check_arguments
from petune.base.errors import AttachError, ConfigError, UnknownName
from petune.base.hub import HubFile, overlay
from petune.sites.site import Site, Sites

HeadKind = Literal["linear", "bn_linear"]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Alias:
    """A short name: a timm model, what is set on it, and what `--weights default` means for it."""

    timm_name: str
    options: dict[str, Any]
    default_weights: str
    about: str


def _augreg(size: str, millions: int) -> Alias:
    name = f"vit_{size}_patch16_224.augreg_in21k"
    return Alias(name, {}, "hub", f"ViT-{size.title()}/16 at 224, ImageNet-21k (AugReg), {millions} M")


_NANO = {"img_size": 32, "patch_size": 4, "depth": 6}
_PADDLE_STUDY = {"img_size": 32, "patch_size": 3, "qkv_bias": False, "norm_eps": 1e-5}
ALIASES = {
    "vit_nano": Alias("vit_tiny_patch16_224", _NANO, "cifar100", "width 192, 6 blocks, 32×32, patch 4, 2.7 M"),
    "vit_tiny": _augreg("tiny", 6),
    "vit_small": _augreg("small", 22),
    "vit_base": _augreg("base", 86),
    "vit_large": _augreg("large", 304),
    "vit_paddle_study": Alias("vit_base_patch16_224", _PADDLE_STUDY, "none given", "the Paddle study's ViT-B, 32×32"),
}


@dataclass(frozen=True)
class Backbone:
    """A model with a fresh head, and how it came to be.

    Attributes:
        model: On the CPU, in eval mode.
        name: As asked for.
        full_name: The timm name with its tag, and the options set on it.
        weights: Where the weights came from (`none` where they are random by request).
        image_size: Side of the square input, in pixels.
        mean, std: Of the input's channels; None where no weights say it.
        file: What was read of the weights' file; None where they are from a hub or random.
    """

    model: nn.Module
    name: str
    full_name: str
    weights: str
    image_size: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    file: Weights | None = None

    @property
    def hub_id(self) -> str | None:
        """The repository on the Hugging Face Hub that the weights came from; None where they came from elsewhere."""
        if self.weights.startswith("hf:"):
            name = self.weights.removeprefix("hf:")
            return None if Path(name).exists() else name
        config: Any = getattr(self.model, "pretrained_cfg", None)
        from_timm = bool(config) and self.full_name.partition(",")[0] == self.weights
        return config.get("hf_hub_id") or None if from_timm else None


def create_backbone(
    name: str,
    *,
    weights: str = "default",
    num_classes: int,
    image_size: int | None = None,
    patch_size: int | None = None,
    options: dict[str, Any] | None = None,
    head: HeadKind = "linear",
    seed: int = 0,
    keep_head_of: tuple[str, ...] | None = None,
) -> Backbone:
    """Build a backbone.

    Args:
        name: An alias; any timm name, with or without tag; or `torchvision:…`, `hf:…`, `package.module:factory`.
        weights: `default`, `none`, `cifar100`, or a path.
        num_classes: Of the fresh head.
        image_size: Side of the input; None is the model's own. Pretrained position embeddings are resampled.
        patch_size: None is the model's own. Pretrained patch embeddings are resampled.
        options: Further arguments of the model, as `drop_path_rate`.
        head: `bn_linear` puts BatchNorm without affine before the linear layer (AdaptFormer's authors).
        seed: Of all random initialisation.
        keep_head_of: Load the file's head too if it was trained on exactly these classes.

    Raises:
        UnknownName: No alias and no timm model of that name.
        WeightsUnavailable: Weights were asked for and cannot be had.
        ConfigError: The model does not take these options.
    """
    alias = _alias(name)
    asked = {"image_size" if is_other_library(name) else "img_size": image_size, "patch_size": patch_size}
    settings = alias.options | {k: v for k, v in asked.items() if v is not None} | (options or {})
    source = alias.default_weights if weights == "default" else weights
    path = _weights_file(name, source)
    file = read_weights(path) if path is not None else None
    laid_over = _hub_overlay(name, alias) if source == "hub" and not is_other_library(name) else None
    with _seeded(seed):
        if is_other_library(name):
            # transformers gives weights as they are stored; what is lower than that, `train.precision` says
            model = build_other_library(name, num_classes, settings, pretrained=source == "hub").float()
        else:
            model = _create(alias.timm_name, settings, laid_over, num_classes)
            if image_size is not None:  # not every model tells what it was built for (Hiera, MViT)
                config: Any = model.pretrained_cfg
                model.__dict__["pretrained_cfg"] = {**config, "input_size": (3, image_size, image_size)}
    if head != "linear" and is_other_library(name):
        raise ConfigError(f"head {head} can only be given to timm's models, but the backbone is {name}")
    set_head(model, num_classes, head, seed)
    mean, std = (_pretrained_statistics(model) if source == "hub" else None) or (None, None)
    sites = _find_sites(model)
    if file is not None:
        kept = keep_head_of is not None and tuple(file.info.get("classes", ())) == keep_head_of
        load_into(model, file, set() if kept else _head_keys(model, sites.parts.get("head")))
        mean, std = _file_statistics(file, alias)
    return Backbone(
        model.eval(),
        name,
        alias.timm_name + "".join(f",{k}={v}" for k, v in sorted(settings.items())),
        file.source if file else alias.timm_name if source == "hub" else "none",
        _image_size(sites),
        tuple(mean) if mean else None,
        tuple(std) if std else None,
        file,
    )


def check_weights(name: str, weights: str) -> None:
    """Whether weights can be had, said before any data is read; of an alias also before timm is imported (3 s).

    Raises:
        WeightsUnavailable: They are not cached and the hub cannot be reached, or there is no such file.
    """
    if is_other_library(name):
        return
    alias = ALIASES.get(name)
    if alias is None:
        if weights == "default":
            _hub_overlay(name, _timm_alias(name), fetch=False)
        return
    source = alias.default_weights if weights == "default" else weights
    if source == "hub":
        overlay(f"{name} ({alias.timm_name})", HubFile(f"timm/{alias.timm_name}"), fetch=False)
    else:
        _weights_file(name, source)


def set_head(model: nn.Module, num_classes: int, kind: HeadKind = "linear", seed: int = 0) -> None:
    """Give a model the head that every method of a comparison gets: trunc_normal(0.01), zero bias."""
    if any(linear.out_features != num_classes for linear in _classifiers(model).values()):
        _resize_head(model, num_classes)
    for path, linear in _classifiers(model).items():  # distilled models have two
        generator = torch.Generator().manual_seed(seed)
        nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        if kind == "bn_linear":
            norm = nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6)
            model.set_submodule(path, nn.Sequential(norm, linear))


def _classifiers(model: nn.Module) -> dict[str, nn.Linear]:
    """The model's linear classifiers by path, as it tells (timm), else as they are found; empty without any."""
    heads: Any = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    if heads is None:
        found = _find_sites(model).parts.get("head")
        heads = found.modules if found is not None else ()
    several = isinstance(heads, tuple | nn.ModuleList)  # CrossViT has one for each scale
    last = [_last_linear(head) for head in (heads if several else (heads,))]
    return {n: m for n, m in model.named_modules() if any(m is linear for linear in last)}


def _last_linear(head: nn.Module) -> nn.Linear | None:
    """The linear layer that a classifier ends with; None in place of a classifier that was taken away."""
    if isinstance(head, nn.Identity):
        return None
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ConfigError(
            f"the classifier must be a linear layer, or end with one, but is a {type(head).__name__} without any. "
            "Build the model yourself, and petune.attach(model, method)"
        )
    return linears[-1]


def _resize_head(model: nn.Module, num_classes: int) -> None:
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(num_classes)  # type: ignore[operator]
        return
    for path, linear in _classifiers(model).items():
        bias = linear.bias is not None
        model.set_submodule(path, nn.Linear(linear.in_features, num_classes, bias, device=linear.weight.device))


def input_side(name: str, image_size: int | None, options: dict[str, Any]) -> int:
    """Side of the input in pixels, known without building the model."""
    import timm

    if image_size is not None:
        return image_size
    alias = _alias(name)
    settings = alias.options | options
    if "img_size" in settings:
        return int(settings["img_size"])
    if is_other_library(name):
        with torch.device("meta"):
            return _image_size(_find_sites(build_other_library(name, 2, settings, pretrained=False)))
    config = timm.get_pretrained_cfg(alias.timm_name, allow_unregistered=False)
    return int(config.input_size[-1]) if config is not None else 224


def list_backbones(pattern: str = "*") -> list[str]:
    """Return the backbone names that match a wildcard: petune's short names, then timm's pretrained models with tags.

    Args:
        pattern: A wildcard such as `*dinov3*`.
    """
    import timm

    check_arguments("petune.list_backbones", pattern=(pattern, str))
    return [*(name for name in ALIASES if fnmatchcase(name, pattern)), *timm.list_models(pattern, pretrained=True)]


def _alias(name: str) -> Alias:
    if is_other_library(name):  # the factory of a user's own model loads what it wants
        return Alias(name, {}, "hub" if name.startswith(("hf:", "torchvision:")) else "none", "")
    return ALIASES.get(name) or _timm_alias(name)


def _timm_alias(name: str) -> Alias:
    import timm

    if not timm.is_model(name):
        known = [*ALIASES, *timm.list_models()]
        raise UnknownName("backbone", name, known, "`petune backbones 'vit*'` lists them")
    config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    tag = f".{config.tag}" if config is not None and config.tag and "." not in name else ""
    return Alias(name + tag, {}, "hub", "")


def _weights_file(name: str, source: str) -> Path | None:
    if source in {"none", "hub"}:
        return None
    if source == "none given":
        from petune.base.errors import WeightsUnavailable

        raise WeightsUnavailable(f"{name} has no pretrained weights; give --weights PATH, or --weights none")
    return find_weights(bundled(source) or Path(source))


def _hub_overlay(name: str, alias: Alias, fetch: bool = True) -> dict[str, Any]:
    import timm
    from timm.models import PretrainedCfg

    config = timm.get_pretrained_cfg(alias.timm_name, allow_unregistered=False) or PretrainedCfg()
    return overlay(alias.timm_name if name == alias.timm_name else f"{name} ({alias.timm_name})", config, fetch=fetch)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _create(timm_name: str, settings: dict[str, Any], overlay: dict[str, Any] | None, num_classes: int) -> nn.Module:
    import timm

    settings = dict(settings)
    if "norm_eps" in settings:
        settings["norm_layer"] = functools.partial(nn.LayerNorm, eps=settings.pop("norm_eps"))
    try:
        model: nn.Module = timm.create_model(
            timm_name,
            pretrained=overlay is not None,
            pretrained_cfg_overlay=overlay or None,
            num_classes=num_classes,
            **settings,
        )
    except (TypeError, AssertionError, ValueError, AttributeError) as error:
        if "unexpected keyword argument 'img_size'" in str(error):  # a convolutional model takes any size
            return _create(timm_name, {k: v for k, v in settings.items() if k != "img_size"}, overlay, num_classes)
        shown = ", ".join(f"{k}={v}" for k, v in settings.items())
        raise ConfigError(f"timm's {timm_name} cannot be built with {shown or 'no options'}: {error}") from None
    return model


def _head_keys(model: nn.Module, head: Site | None) -> set[str]:
    modules = {id(m) for h in (head.modules if head is not None else ()) for m in h.modules()}
    owned = [n for n, m in model.named_modules() if id(m) in modules]
    return {key for key in model.state_dict() if any(key.startswith(f"{n}.") for n in owned)}


def _pretrained_statistics(model: nn.Module) -> Statistics | None:
    config: Any = getattr(model, "pretrained_cfg", None)
    return (tuple(config["mean"]), tuple(config["std"])) if config else None


def _file_statistics(file: Weights, alias: Alias) -> Statistics | tuple[None, None]:
    """What a file's weights were trained with: as it says, else as timm says of the weights it has under that name."""
    import timm

    if "mean" in file.info:
        return file.info["mean"], file.info.get("std")
    if file.info or is_other_library(alias.timm_name) or alias.default_weights != "hub":
        return None, None
    config = timm.get_pretrained_cfg(alias.timm_name, allow_unregistered=False)
    return (config.mean, config.std) if config is not None and config.has_weights else (None, None)


def _image_size(sites: Sites) -> int:
    size = sites.input_size
    if size[-1] != size[-2]:
        raise ConfigError(f"the input must be square, but is {size[-2]}×{size[-1]}; give --image-size")
    return int(size[-1])


def _find_sites(model: nn.Module) -> Sites:
    from petune.sites.find import find_sites

    try:
        return find_sites(model)
    except AttachError as error:
        raise ConfigError(f"{error}. On the command line: --image-size") from error
