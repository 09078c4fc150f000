"""Names of backbones: short names, timm's names, and names of other libraries."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from petune.base.arguments import check_arguments
from petune.base.errors import UnknownName
from petune.base.imports import quick_imports

LIBRARIES = ("torchvision", "hf")
HUB = "hub"
"""Weights that belong to the name, from the model's library or a hub."""


@dataclass(frozen=True)
class Alias:
    """A backbone's name, resolved.

    Attributes:
        timm_name: Name of the model in timm, such as `vit_base_patch16_224.augreg_in21k`; for other libraries the name
            as given.
        default_weights: What `weights="default"` means: `hub`, `none`, the name of bundled weights, or None if there
            are no pretrained weights.
        options: Arguments of the model's builder.
        about: One line of description.
    """

    timm_name: str
    default_weights: str | None = HUB
    options: dict[str, Any] = field(default_factory=dict)
    about: str = ""


def _augreg(size: str, millions: int) -> Alias:
    name = f"vit_{size}_patch16_224.augreg_in21k"
    return Alias(name, about=f"ViT-{size.title()}/16 at 224, ImageNet-21k (AugReg), {millions} M")


_NANO = {"img_size": 32, "patch_size": 4, "depth": 6}
_PADDLE_STUDY = {"img_size": 32, "patch_size": 3, "qkv_bias": False, "norm_eps": 1e-5}
ALIASES = {
    "vit_nano": Alias("vit_tiny_patch16_224", "cifar100", _NANO, "width 192, 6 blocks, 32×32, patch 4, 2.7 M"),
    "vit_tiny": _augreg("tiny", 6),
    "vit_small": _augreg("small", 22),
    "vit_base": _augreg("base", 86),
    "vit_large": _augreg("large", 304),
    "vit_paddle_study": Alias("vit_base_patch16_224", None, _PADDLE_STUDY, "the Paddle study's ViT-B, 32×32"),
}


def is_other_library(name: str) -> bool:
    """Return True for `torchvision:NAME`, `hf:NAME` and `package.module:factory`."""
    return ":" in name


def image_size_key(name: str) -> str:
    """Return the option by which a backbone is built for another side of the input."""
    return "image_size" if is_other_library(name) else "img_size"


def calls_user_code(name: str) -> bool:
    """Return True for `package.module:factory`, which runs code outside petune and the known libraries."""
    return is_other_library(name) and name.partition(":")[0] not in LIBRARIES


def resolve_name(name: str) -> Alias:
    """Resolve the name of a backbone.

    Raises:
        UnknownName: It is neither a short name nor a model of timm.
    """
    if calls_user_code(name):
        return Alias(name, "none")  # the factory itself loads weights, if any
    if is_other_library(name):
        return Alias(name)
    return ALIASES.get(name) or _resolve_timm(name)


def _resolve_timm(name: str) -> Alias:
    with quick_imports():
        import timm

    if not timm.is_model(name):
        known = [*ALIASES, *timm.list_models()]
        raise UnknownName(
            "backbone",
            name,
            known,
            "petune.list_backbones('vit*') lists timm's; a new one may need pip install -U timm. Models of other "
            "packages are torchvision:NAME, hf:NAME or package.module:factory, once the package is installed",
            cli_hint="To list names: petune backbones 'vit*'",
        )
    config = timm.get_pretrained_cfg(name, allow_unregistered=False)
    tag = f".{config.tag}" if config is not None and config.tag and "." not in name else ""
    return Alias(name + tag)


def list_backbones(pattern: str = "*") -> list[str]:
    """Return the backbone names that match a wildcard: petune's short names, then timm's pretrained models with tags.

    Args:
        pattern: A wildcard such as `*dinov3*`.

    Raises:
        UsageError: `pattern` is not a string.
    """
    check_arguments("petune.list_backbones", pattern=(pattern, str))
    with quick_imports():
        import timm

    short_names = [name for name in ALIASES if fnmatchcase(name, pattern)]
    return [*short_names, *timm.list_models(pattern, pretrained=True)]
