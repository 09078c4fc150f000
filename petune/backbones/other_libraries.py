"""Backbones that are not timm's: torchvision's, transformers', and your own `package.module:factory`."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from petune.backbones.timm_repository import build_timms, timms_architecture
from petune.base.errors import AttachError, ConfigError, MissingExtra, UnknownName, WeightsUnavailable, did_you_mean
from petune.base.hub import HubFile, hub_url, overlay
from petune.base.network import reachable
from petune.sites.geometry import input_sizes_of

LIBRARIES = ("torchvision", "hf")
TORCHVISION_SIDE = 224  # what its pretrained models were trained at; those without position embeddings do not say


def is_other_library(name: str) -> bool:
    """Whether a backbone's name is one of those read here: `torchvision:NAME`, `hf:NAME`, `package.module:factory`."""
    return ":" in name


def calls_a_function(name: str) -> bool:
    """Whether building it calls `package.module:factory`, code that is neither petune's nor a known library's."""
    return is_other_library(name) and name.partition(":")[0] not in LIBRARIES


def build_other_library(name: str, num_classes: int, options: dict[str, Any], *, pretrained: bool) -> nn.Module:
    """Build a model that maps images to logits, and that tells its image's size as `image_size`.

    Args:
        name: `torchvision:vit_b_16`, `hf:facebook/dinov2-small` or `hf:DIR` with a `config.json`, `my.package:make`.
        num_classes: Of the classifier, where the model's builder takes it.
        options: Arguments of the builder, or keys of transformers' config.
        pretrained: Load the weights that belong to the name.

    Raises:
        UnknownName: There is no such model.
        MissingExtra: transformers is not installed.
        WeightsUnavailable: Weights were asked for and cannot be had.
        ConfigError: The builder does not take these options, or the import fails.
    """
    source, _, rest = name.partition(":")
    if calls_a_function(name):
        model = _own(name, num_classes, options)
    else:
        build = _torchvision if source == "torchvision" else _transformers
        model = build(rest, num_classes, options, pretrained)
    if "image_size" in options or not _tells_size(model):
        side = options.get("image_size", TORCHVISION_SIDE if source == "torchvision" else None)
        if side is not None:
            model.image_size = side
    return model


def _tells_size(model: nn.Module) -> bool:
    with contextlib.suppress(AttachError):
        return bool(input_sizes_of(model))
    return False


def _torchvision(name: str, num_classes: int, options: dict[str, Any], pretrained: bool) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UnknownName("torchvision model", name, known, "torchvision.models.list_models() lists all")
    if pretrained:
        file = HubFile("", url=models.get_model_weights(name).DEFAULT.url)
        overlay(f"torchvision:{name}", file, fetch=False)
    takes_classes = {} if pretrained else {"num_classes": num_classes}  # weights come with their own classifier
    taken = options if "vit" in name else {k: v for k, v in options.items() if k != "image_size"}
    with _readable(f"torchvision:{name}", options):
        model: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None, **takes_classes, **taken)
    if pretrained:
        seen = models.get_model_weights(name).DEFAULT.transforms()
        set_statistics(model, seen.mean, seen.std)
    return model


def set_statistics(model: nn.Module, mean: Any, std: Any) -> None:
    """Note what a model's weights were trained with, where timm's models have it too."""
    model.__dict__["pretrained_cfg"] = {"mean": tuple(mean), "std": tuple(std)}


def _own(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    factory = _imported(name)
    taken = inspect.signature(factory).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    given = {"num_classes": num_classes} | options
    optional = {"num_classes", "image_size"}  # a model may know its own; a classifier is exchanged afterwards
    with _readable(name, options):
        model = factory(**{k: v for k, v in given.items() if everything or k in taken or k not in optional})
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} must return an nn.Module, but it returned a {type(model).__name__}")
    return model


def _imported(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # a console script does not look into the directory it was called in
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--backbone {name} must name a function, as package.module:factory, that returns a model, but: {error}"
        ) from error


@contextlib.contextmanager
def _readable(name: str, options: dict[str, Any]) -> Any:
    try:
        yield
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        shown = ", ".join(f"{k}={v}" for k, v in options.items())
        raise ConfigError(f"{name} cannot be built with {shown or 'no options'}: {error}") from error


class Logits(nn.Module):
    """A transformers classifier as a plain one: its logits instead of its output object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.pretrained_cfg = getattr(model, "pretrained_cfg", None)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C)."""
        logits_BC: Tensor = self.model(images_BCHW).logits
        return logits_BC


class PooledClassifier(nn.Module):
    """A linear classifier on a transformers model that has none: on its pooled output, else on the mean of tokens."""

    def __init__(self, model: nn.Module, dim: int, num_classes: int) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(dim, num_classes)
        self.pretrained_cfg = getattr(model, "pretrained_cfg", None)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C)."""
        output = self.model(images_BCHW)
        pooled_BD = getattr(output, "pooler_output", None)
        if pooled_BD is None:
            pooled_BD = output.last_hidden_state.mean(1)
        logits_BC: Tensor = self.head(pooled_BD)
        return logits_BC


def _transformers(name: str, num_classes: int, options: dict[str, Any], pretrained: bool) -> nn.Module:
    try:
        import transformers
        from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
        from transformers.utils import cached_file
    except ImportError:
        raise MissingExtra("a backbone named hf:…", "transformers") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    offline = not Path(name).is_dir() and not reachable(hub_url())
    size = None
    try:
        described = Path(cached_file(name, "config.json", local_files_only=offline))
        if (timms := timms_architecture(described)) is not None:
            return build_timms(name, timms, described.parent, num_classes, options, pretrained=pretrained)
        config = AutoConfig.from_pretrained(name, local_files_only=offline)
        config = _for_classifying(getattr(config, "vision_config", None) or config)
        size = getattr(config, "image_size", None)
        _check_options(name, config, options)
        config.update({**options, "num_labels": num_classes})
        # None where a file does not say, which transformers cannot read where a config has several models (DeiT)
        config.architectures = config.architectures or []
        with _readable(f"hf:{name}", options):
            if type(config) in AutoModelForImageClassification._model_mapping:
                return Logits(_made(AutoModelForImageClassification, name, config, pretrained, offline))
            body = _made(AutoModel, name, config, pretrained, offline)
            return PooledClassifier(body, config.hidden_size, num_classes)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        asked = f" at image size {options['image_size']}" if options.get("image_size", size) != size else ""
        raise WeightsUnavailable(
            f"hf:{name} must be a directory with config.json (and the weights, unless --weights none is given), or a "
            f"model of the Hugging Face Hub{asked}, but: {first}"
        ) from error


def _check_options(name: str, config: Any, options: dict[str, Any]) -> None:
    """transformers takes any key and says nothing."""
    for key in options:
        if key != "image_size" and not hasattr(config, key):
            raise ConfigError(
                f"the options of hf:{name} must be keys of its {type(config).__name__}, but {key!r} is none"
                f"{did_you_mean(key, config.to_dict())}"
            )


def _for_classifying(config: Any) -> Any:
    """ViT-MAE's own model hides random patches in every forward; its encoder's weights are those of a plain ViT.

    Fine-tuning sees all patches (He et al., 2021, 2111.06377, section 4).
    """
    from transformers import ViTConfig

    return ViTConfig(**config.to_dict()) if config.model_type == "vit_mae" else config


def _made(cls: Any, name: str, config: Any, pretrained: bool, offline: bool) -> nn.Module:
    if not pretrained:
        return cls.from_config(config)  # type: ignore[no-any-return]
    from transformers import AutoImageProcessor

    asked = {"ignore_mismatched_sizes": True, "local_files_only": offline}
    model, told = cls.from_pretrained(name, config=config, output_loading_info=True, **asked)
    random = _random_keys(model, told)
    tables = {key: shape for key, shape, _ in told["mismatched_keys"] if key in random and "position_embedding" in key}
    if tables:
        its_own = type(config).from_pretrained(name, local_files_only=offline)
        config = type(config).from_dict({**config.to_dict(), "image_size": its_own.image_size})
        random -= _resampled(model, cls.from_pretrained(name, config=config, **asked), tables)
    if random:
        shown = ", ".join(sorted(random)[:3]) + (", …" if len(random) > 3 else "")
        raise WeightsUnavailable(
            f"the weights of hf:{name} must fill all but the classifier, but {len(random)} parts are missing there or "
            f"have another shape: {shown}. Leave out the options that change the model, or give --weights none"
        )
    with contextlib.suppress(OSError):  # a directory without preprocessing: the dataset's own statistics are taken
        seen = AutoImageProcessor.from_pretrained(name, local_files_only=offline)
        _set_processor(model, name, seen)
    return model  # type: ignore[no-any-return]


def _set_processor(model: nn.Module, name: str, processor: Any) -> None:
    """Images as transformers would give them: scaled to 0…1, then normalised or not."""
    if getattr(processor, "do_flip_channel_order", False):
        warnings.warn(
            f"the weights of hf:{name} were trained on images with blue, green and red in this order, but petune "
            "gives red, green and blue: they are worth less here",
            stacklevel=2,
        )
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not getattr(processor, "do_normalize", True):
        mean, std = 0.0, 1.0
    if mean is not None and std is not None:
        both = [(value,) * 3 if isinstance(value, int | float) else tuple(value) for value in (mean, std)]
        set_statistics(model, *both)


def _random_keys(model: Any, told: Any) -> set[str]:
    """What of a loaded model no weights filled, but for its classifier and a mask that only pretraining uses."""
    unfilled = {*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])}
    prefix = f"{model.base_model_prefix}."
    if model.base_model is not model:
        unfilled = {key for key in unfilled if key.startswith(prefix)}
    elif "ForImageClassification" in type(model).__name__:
        unfilled = {key for key in unfilled if "classifier" not in key.partition(".")[0]}
    return {key for key in unfilled if not key.endswith("mask_token")}


def _resampled(model: nn.Module, original: nn.Module, tables: dict[str, Any]) -> set[str]:
    """Fill position embeddings with those of the same model for images of its own size; return which were.

    Legend: N tokens, of which the first are no patches; D width.

    Args:
        tables: Their keys, and their shapes in the file.
    """
    from timm.layers import resample_abs_pos_embed

    here, there = model.state_dict(), original.state_dict()
    done = set()
    for key, shape in tables.items():
        wanted, found = here[key], there[key]
        sides = [(p, math.isqrt(wanted.shape[-2] - p)) for p in range(min(4, wanted.shape[-2], found.shape[-2]))]
        both = [(p, side) for p, side in sides if side**2 + p == wanted.shape[-2]
                and math.isqrt(found.shape[-2] - p) ** 2 + p == found.shape[-2]]  # fmt: skip
        if found.shape == shape and wanted.shape[-1] == found.shape[-1] and both:
            prefix, side = both[0]
            table_1ND = found.reshape(1, *found.shape[-2:])
            wanted.copy_(
                resample_abs_pos_embed(table_1ND, [side, side], num_prefix_tokens=prefix).reshape(wanted.shape)
            )
            done.add(key)
    return done
