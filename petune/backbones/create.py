"""Build a backbone from its name: the model at a size, with weights and a fresh head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from petune.backbones.clips import ClipForm, set_clip_form
from petune.backbones.from_file import build_empty, has_values
from petune.backbones.head import HeadKind, set_head
from petune.backbones.input_channels import channel_settings, set_input_channels
from petune.backbones.input_size import (
    backbone_sites,
    check_patch_size,
    frames_option,
    side_option,
    square_input,
)
from petune.backbones.names import (
    ALIASES,
    HUB,
    Alias,
    calls_user_code,
    image_size_key,
    is_other_library,
    resolve_name,
)
from petune.backbones.other_libraries import build_other_library
from petune.backbones.quantize import BasePrecision, check_base_precision, quantize_backbone
from petune.backbones.timm_models import (
    Statistics,
    build_timm,
    check_alias_weights,
    pretrained_overlay,
    pretrained_statistics,
)
from petune.backbones.user_factory import return_logits
from petune.backbones.weights import Weights, bundled_file, find_weights, fitting_tensors, load_into, read_weights
from petune.base.errors import AttachError, ConfigError, WeightsUnavailable
from petune.base.imports import quick_imports
from petune.sites.input_size import frames_of
from petune.sites.site import Site, modules_in
from petune.sites.sites import Sites


@dataclass(frozen=True)
class Backbone:
    """A model with a fresh head, and how it was built.

    Attributes:
        model: On the CPU, in eval mode.
        name: The name as given.
        full_name: The timm name with its tag, and the options.
        weights: Where the weights came from; `none` if they are random.
        image_size: Side of the square input, in pixels.
        mean, std: Statistics of the input per channel; None if no weights define them.
        file: Contents of the weights file; None if the weights came from a hub or are random.
        num_frames: Frames of a clip; None if the model takes images.
        clip_form: What the model itself takes of a clip; None for images.
        sites: Its sites, if nothing has changed the model since they were found.
    """

    model: nn.Module
    name: str
    full_name: str
    weights: str
    image_size: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    file: Weights | None = None
    num_frames: int | None = None
    clip_form: ClipForm | None = None
    sites: Sites | None = None

    @property
    def hub_id(self) -> str | None:
        """Repository on the Hugging Face Hub that the weights came from; None if they came from elsewhere."""
        if self.weights.startswith("hf:"):
            name = self.weights.removeprefix("hf:")
            return None if Path(name).exists() else name
        return self._timm_config.get("hf_hub_id") or None

    @property
    def license(self) -> str | None:
        """License of the weights, as timm records it; None if it is not known."""
        name = self._timm_config.get("license")
        return name if name and name != "unknown" else None

    @property
    def _timm_config(self) -> Mapping[str, Any]:
        """Return timm's record of the pretrained weights; empty if the weights came from elsewhere."""
        config: Any = getattr(self.model, "pretrained_cfg", None)
        from_timm = bool(config) and self.full_name.partition(",")[0] == self.weights
        return config if from_timm else {}


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
    initial_classes: int | None = None,
    channels: int | None = None,
    num_frames: int | None = None,
    stay_in_file: bool = False,
    base_precision: BasePrecision = "auto",
) -> Backbone:
    """Build a backbone.

    Args:
        name: A short name; any timm name, with or without tag; or `torchvision:…`, `hf:…`, `package.module:factory`.
        weights: `default`, `none`, `cifar100`, or a path.
        num_classes: Outputs of the fresh head.
        image_size: Side of the input; None is the model's own. Pretrained position embeddings are resampled.
        patch_size: None is the model's own. Pretrained patch embeddings are resampled.
        options: More arguments of the model, such as `drop_path_rate`.
        head: See `set_head`.
        seed: Seed of all random initialization.
        initial_classes: Outputs of the head that a model with random weights is built with, before it gets the fresh
            one. The values that are drawn for the backbone depend on it. None is `num_classes`.
        channels: Channels of the images; the patch embedding is adapted to them, see `petune.backbones.input_channels`.
            None leaves the model as it is.
        num_frames: Frames of a clip, which is what the model then takes, see `petune.take_clips`. None is the model's
            own number; a model of images has none.
        keep_head_of: Load the file's head as well, if it was trained on exactly these classes.
        stay_in_file: Leave matrices in a float32 safetensors file, where that is possible, until they are used; see
            `petune.sites.file_values`.
        base_precision: Number format that the weights of linear layers are stored in; see `quantize_backbone`.

    Raises:
        UnknownName: There is no such short name or timm model.
        MissingExtra: The number format needs a package that is not installed.
        WeightsUnavailable: The weights are neither cached nor downloadable.
        ConfigError: The model does not accept these options.
    """
    check_base_precision(base_precision)
    alias = resolve_name(name)
    sizes = {image_size_key(name): image_size, "patch_size": patch_size}
    settings = alias.options | {key: size for key, size in sizes.items() if size is not None} | (options or {})
    settings = channel_settings(name, settings, channels, is_timm=not is_other_library(name))
    if num_frames is not None:
        settings["num_frames"] = num_frames
    _check_sizes(name, settings)
    source = _weights_source(name, alias, weights)
    file = None if source in {"none", HUB} else read_weights(Path(source))
    outputs = (initial_classes or num_classes) if source == "none" else num_classes

    stay_in_file = stay_in_file or base_precision != "auto"  # until they are quantized, one by one

    def build() -> nn.Module:
        with _seeded(seed):
            return _build(name, alias, settings, outputs, pretrained=source == HUB, stay_in_file=stay_in_file)

    def complete(model: nn.Module) -> tuple[nn.Module, Sites, ClipForm | None]:
        if image_size is not None and not is_other_library(name):
            _record_input_size(model, image_size, settings.get("in_chans", 3))
        if channels is not None and is_other_library(name):
            set_input_channels(name, model, channels)
        frames = settings.get("num_frames") or frames_of(model)
        clip_form = _clip_form(model, frames) if frames is not None else None
        set_head(model, num_classes, head, seed)
        sites = backbone_sites(model)
        if calls_user_code(name):
            return_logits(name, model, sites, num_classes)
        if file is not None:
            keeps_head = keep_head_of is not None and tuple(file.info.get("classes", ())) == keep_head_of
            head_keys = set() if keeps_head else _head_keys(model, sites.parts.get("head"))
            load_into(model, file, head_keys, stay_in_file=stay_in_file)
        return model, sites, clip_form

    empty = build_empty(build) if file is not None and file.mapped and not calls_user_code(name) else None
    completed = None
    if empty is not None:
        with contextlib.suppress(Exception):  # the usual way says what is wrong
            completed = complete(empty)
    if completed is None or not has_values(completed[0]):  # its head, which no file fills, is on the meta device
        completed = complete(build())
    model, sites, clip_form = completed
    quantize_backbone(model, base_precision, sites)
    num_frames = settings.get("num_frames") or frames_of(model)
    statistics = pretrained_statistics(model) if source == HUB else None
    if file is not None:
        statistics = _file_statistics(file, alias)
    mean, std = statistics or (None, None)
    is_open = file is not None and sites.grid_size is None  # with the file's weights, noise may show the patches
    return Backbone(
        model=model.eval(),
        name=name,
        full_name=alias.timm_name + "".join(f",{key}={value}" for key, value in sorted(settings.items())),
        weights=file.source if file else alias.timm_name if source == HUB else "none",
        image_size=square_input(sites),
        mean=tuple(mean) if mean else None,
        std=tuple(std) if std else None,
        file=file,
        num_frames=num_frames,
        clip_form=clip_form,
        sites=None if calls_user_code(name) or base_precision != "auto" or is_open else sites,
    )


def check_weights(name: str, weights: str) -> None:
    """Check that weights are available, before any data is read; for short names even before timm is imported (3 s).

    Raises:
        WeightsUnavailable: They are not cached and the hub cannot be reached, or there is no such file.
    """
    alias = resolve_name(name)
    source = _weights_source(name, alias, weights)
    if source != HUB or is_other_library(name):
        return
    if name in ALIASES:
        check_alias_weights(name, alias)
    else:
        pretrained_overlay(name, alias, fetch=False)


def check_weights_file(name: str, weights: str, model: nn.Module, head: Site | None) -> None:
    """Check that the weights fit a model of that name, if they come from a file.

    Args:
        name, weights: See `create_backbone`.
        model: May be on the meta device.
        head: Its classifier, which need not fit.

    Raises:
        WeightsUnavailable: There is no such file.
        CheckpointError: It is damaged, or does not fit.
    """
    source = _weights_source(name, resolve_name(name), weights)
    if source not in {"none", HUB}:
        fitting_tensors(model, read_weights(Path(source)), _head_keys(model, head))


def input_side(name: str, image_size: int | None, options: dict[str, Any]) -> int:
    """Return the side of a backbone's input in pixels; models of timm are not built for that."""
    with quick_imports():
        import timm

    alias = resolve_name(name)
    settings = alias.options | options
    side = _check_sizes(name, settings)
    if image_size is not None:
        return image_size
    if side is not None:
        return side
    if is_other_library(name):
        with torch.device("meta"):
            model = build_other_library(name, 2, settings, pretrained=False)
            num_frames = settings.get("num_frames") or frames_of(model)
            if num_frames is not None:
                _clip_form(model, num_frames)
            return square_input(backbone_sites(model))
    config = timm.get_pretrained_cfg(alias.timm_name, allow_unregistered=False)
    return int(config.input_size[-1]) if config is not None else 224


def input_frames(name: str, options: dict[str, Any]) -> int | None:
    """Return the frames of the clips that a backbone takes; None if it takes images."""
    _check_sizes(name, options)
    if "num_frames" in options:
        return frames_option(options)
    if not is_other_library(name):
        return None
    with torch.device("meta"):
        return frames_of(build_other_library(name, 2, options, pretrained=False))


def _check_sizes(name: str, settings: Mapping[str, Any]) -> int | None:
    """Check the sizes in a backbone's settings; return the side of its input if `img_size` is among them."""
    frames_option(settings)
    side_option(settings, "image_size")
    if not calls_user_code(name):  # a function of the user may mean something else by it
        check_patch_size(settings)
    return side_option(settings, "img_size")


def _clip_form(model: nn.Module, num_frames: int) -> ClipForm:
    try:
        return set_clip_form(model, num_frames)
    except AttachError as error:
        raise ConfigError(f"{error}. Try another number of frames, or another image_size") from error


def _weights_source(name: str, alias: Alias, weights: str) -> str:
    """Return `none`, `hub`, or the path of an existing weights file."""
    source = alias.default_weights if weights == "default" else weights
    if source is None:
        raise WeightsUnavailable(
            f"there are no pretrained weights for {name}. Use weights='none' for random weights, or give a path",
            cli_hint="--weights none, or --weights PATH",
        )
    if source in {"none", HUB}:
        return source
    return str(find_weights(bundled_file(source) or Path(source)))


def _build(
    name: str, alias: Alias, settings: dict[str, Any], num_classes: int, *, pretrained: bool, stay_in_file: bool
) -> nn.Module:
    if is_other_library(name):
        # transformers keeps the stored dtype; train.precision alone decides whether to use a lower one
        return build_other_library(
            name, num_classes, settings, pretrained=pretrained, stay_in_file=stay_in_file
        ).float()
    settings = {key: value for key, value in settings.items() if key != "num_frames"}  # timm has models of images only
    overlay = pretrained_overlay(name, alias) if pretrained else None
    return build_timm(alias.timm_name, settings, num_classes, overlay, stay_in_file=stay_in_file)


def _record_input_size(model: nn.Module, image_size: int, channels: int) -> None:
    """Record the size that a model of timm was built for, which not every model does (Hiera, MViT)."""
    config: Any = model.pretrained_cfg
    model.__dict__["pretrained_cfg"] = {**config, "input_size": (channels, image_size, image_size)}


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _head_keys(model: nn.Module, head: Site | None) -> set[str]:
    modules = modules_in([head]) if head else set()
    prefixes = tuple(f"{path}." for path, module in model.named_modules() if module in modules)
    return {key for key in model.state_dict() if key.startswith(prefixes)}


def _file_statistics(file: Weights, alias: Alias) -> Statistics | None:
    """Return the statistics that a file's weights were trained with.

    The file names them, or timm does for the weights that it has under the same name.
    """
    import timm

    if "mean" in file.info and "std" in file.info:
        return file.info["mean"], file.info["std"]
    if file.info or is_other_library(alias.timm_name) or alias.default_weights != HUB:
        return None
    config = timm.get_pretrained_cfg(alias.timm_name, allow_unregistered=False)
    return (config.mean, config.std) if config is not None and config.has_weights else None
