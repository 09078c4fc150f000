"""Build timm's models: by name, or from a repository in timm's own layout."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from petune.backbones.from_file import build_from_file, is_safetensors
from petune.backbones.names import Alias
from petune.backbones.repository_files import damage_named
from petune.base.errors import ConfigError, UnknownName, WeightsUnavailable
from petune.base.hub import HubFile, check_weights_available, fetch_weights

BUILD_ERRORS = (TypeError, AssertionError, ValueError, AttributeError, ArithmeticError, LookupError, RuntimeError)
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per channel."""


def pretrained_overlay(name: str, alias: Alias, *, fetch: bool = True) -> dict[str, Any]:
    """Return what to overlay on timm's pretrained_cfg, so that timm loads a file that exists.

    Args:
        name: The name as given, for messages.
        alias: The same, resolved.
        fetch: Download the weights if they are not cached; otherwise only check that the hub can be reached.

    Raises:
        WeightsUnavailable: They are neither cached nor downloadable.
    """
    import timm
    from timm.models import PretrainedCfg

    config = timm.get_pretrained_cfg(alias.timm_name, allow_unregistered=False) or PretrainedCfg()
    label = alias.timm_name if name == alias.timm_name else f"{name} ({alias.timm_name})"
    if fetch:
        return {"file": str(fetch_weights(label, config))}
    check_weights_available(label, config)
    return {}


def check_alias_weights(name: str, alias: Alias) -> None:
    """Check that the weights of a short name are cached or downloadable, without importing timm (3 s).

    Raises:
        WeightsUnavailable: They are not.
    """
    check_weights_available(f"{name} ({alias.timm_name})", HubFile(f"timm/{alias.timm_name}"))


def build_timm(
    timm_name: str,
    settings: Mapping[str, Any],
    num_classes: int,
    pretrained_cfg: dict[str, Any] | None,
    *,
    stay_in_file: bool = False,
) -> nn.Module:
    """Build a model of timm.

    Args:
        timm_name: With its tag.
        settings: Arguments of the model; `norm_eps` is the epsilon of its LayerNorms.
        num_classes: Outputs of the classifier.
        pretrained_cfg: See `pretrained_overlay`; None gives random weights.
        stay_in_file: See `build_from_file`.

    Raises:
        ConfigError: The model does not accept these settings.
    """
    import timm

    arguments = dict(settings)
    if "norm_eps" in arguments:
        arguments["norm_layer"] = functools.partial(nn.LayerNorm, eps=arguments.pop("norm_eps"))
    build = functools.partial(
        timm.create_model,
        timm_name,
        pretrained=pretrained_cfg is not None,
        pretrained_cfg_overlay=pretrained_cfg or None,
        num_classes=num_classes,
        **arguments,
    )
    try:
        return _build_with_weights(build, (pretrained_cfg or {}).get("file"), stay_in_file=stay_in_file)
    except BUILD_ERRORS as error:
        if isinstance(error, TypeError) and "img_size" in settings:  # a convolutional model takes any size
            without_size = {key: value for key, value in settings.items() if key != "img_size"}
            return build_timm(timm_name, without_size, num_classes, pretrained_cfg, stay_in_file=stay_in_file)
        raise ConfigError(f"timm cannot build {describe(timm_name, settings)}: {_one_line(error)}") from None


def _build_with_weights(build: Callable[[], nn.Module], file: str | None, *, stay_in_file: bool) -> nn.Module:
    """Return what `build` returns, which reads its weights from a file; straight into place if that is possible."""
    path = Path(file or "")
    model = build_from_file(build, path, stay_in_file=stay_in_file) if is_safetensors(path) else None
    return build() if model is None else model


def pretrained_statistics(model: nn.Module) -> Statistics | None:
    """Return the statistics that a model's weights were trained with, if its `pretrained_cfg` names them."""
    config: Any = getattr(model, "pretrained_cfg", None)
    return (tuple(config["mean"]), tuple(config["std"])) if config else None


def set_statistics(model: nn.Module, mean: Iterable[float], std: Iterable[float]) -> None:
    """Record the statistics that a model's weights were trained with, in the attribute that timm's models use."""
    model.__dict__["pretrained_cfg"] = {"mean": tuple(mean), "std": tuple(std)}


def repository_architecture(config_file: Path) -> str | None:
    """Return the timm model that a `config.json` names, or None if the file is transformers'.

    Raises:
        WeightsUnavailable: The file is damaged.
    """
    try:
        config = json.loads(config_file.read_bytes())
    except ValueError as error:
        raise WeightsUnavailable(f"{config_file} is not valid JSON: {error}") from None
    return None if "model_type" in config else config.get("architecture")


def build_timm_repository(
    name: str,
    architecture: str,
    folder: Path,
    num_classes: int,
    options: Mapping[str, Any],
    *,
    pretrained: bool,
    stay_in_file: bool = False,
) -> nn.Module:
    """Build the model that a repository or directory in timm's layout describes, as `timm.create_model("hf-hub:…")`.

    Args:
        name: Name of the repository, or the directory.
        architecture: See `repository_architecture`.
        folder: Where its `config.json` is.
        num_classes: Outputs of the classifier.
        options: Arguments of the model, and `image_size`; `num_frames` is left out, because timm's models take images.
        pretrained: Load the weights. They must fill the whole model; position embeddings are resampled.
        stay_in_file: See `build_from_file`.

    Raises:
        UnknownName: timm does not know the architecture.
        ConfigError: The model does not accept these options.
        WeightsUnavailable: The weights are not available, or do not fill the model.
        CheckpointError: A file is damaged.
    """
    import timm

    if not timm.is_model(architecture):
        raise UnknownName("timm model", architecture, timm.list_models(), f"{folder / 'config.json'} names it")
    if pretrained and not Path(name).is_dir():
        folder = fetch_weights(f"hf:{name}", HubFile(name)).parent
    keys = {"image_size": "img_size"}
    settings = {keys.get(key, key): value for key, value in options.items() if key != "num_frames"}
    try:
        # with its own classifier: if timm is to leave that out, it lets anything be missing
        build = functools.partial(timm.create_model, f"local-dir:{folder}", pretrained=pretrained, **settings)
        file = str(folder / "model.safetensors") if pretrained and (folder / "model.safetensors").is_file() else None
        with damage_named(str(folder)) if pretrained else contextlib.nullcontext():
            model = _build_with_weights(build, file, stay_in_file=stay_in_file)
    except RuntimeError as error:
        raise WeightsUnavailable(
            f"the weights of hf:{name} do not fit timm's {describe(architecture, options)}: {_one_line(error)}"
        ) from None
    except BUILD_ERRORS as error:
        raise ConfigError(f"timm cannot build {describe(architecture, options)}: {_one_line(error)}") from None
    if model.num_classes != num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model


def describe(name: str, options: Mapping[str, Any]) -> str:
    """Return `NAME with key=value, …` for messages."""
    return f"{name} with " + (", ".join(f"{key}={value}" for key, value in options.items()) or "no options")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
