"""Build transformers' models, and models in timm's layout from the same hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from petune.backbones.timm_models import BUILD_ERRORS, build_timm_repository, describe, repository_architecture
from petune.backbones.transformers_videos import by_config_key
from petune.backbones.transformers_weights import load_pretrained, quiet_transformers
from petune.base.errors import ConfigError, MissingExtra, WeightsUnavailable, did_you_mean
from petune.base.hub import hub_url
from petune.base.network import reachable
from petune.sites.logits import logits_of


def _return_logits(model: nn.Module, args: Any, output: Any) -> Tensor:
    """Forward hook: let a classifier of transformers return its logits (B, C) instead of an output object.

    Some have a dimension for the one query of their attention pooling (VideoPrism): (B, 1, C).
    """
    logits = logits_of(output)
    return logits.squeeze(1) if logits.ndim == 3 else logits


def _classify(model: nn.Module, args: Any, output: Any) -> Tensor:
    """Forward hook: put `model.classifier` on the pooled output, or on the mean token if there is none: (B, C)."""
    features = getattr(output, "pooler_output", None)
    if features is None:
        features = output.last_hidden_state
    if features.ndim == 4:  # (B, D, H, W)
        features = features.flatten(2).mT
    pooled_BD = features.mean(1) if features.ndim == 3 else features
    logits_BC: Tensor = model.classifier(pooled_BD)  # type: ignore[operator]
    return logits_BC


def _feature_width(config: Any) -> int:
    """Return the width D of what an encoder returns.

    Raises:
        ConfigError: The config does not tell it.
    """
    width = getattr(config, "hidden_size", None) or (getattr(config, "hidden_sizes", None) or [None])[-1]
    if isinstance(width, int):
        return width
    raise ConfigError(
        f"transformers has no classifier for a {type(config).__name__}, which does not tell the width of its features "
        "(hidden_size) either. Let a function of your own build the model with its classifier: my_package.models:make"
    )


def _with_logits(model: Any, num_classes: int, *, classifies: bool) -> nn.Module:
    """Let a model of transformers map images to logits; it stays transformers' own, so adapters have its keys.

    Args:
        model: Changed in place. One without a classifier gets a linear one, as `classifier`.
        num_classes: Outputs of that one.
        classifies: The model has a classifier.
    """
    if not classifies:
        model.classifier = nn.Linear(_feature_width(model.config), num_classes)
    model.register_forward_hook(_return_logits if classifies else _classify)
    return model  # type: ignore[no-any-return]


def build_hf(
    name: str, num_classes: int, options: Mapping[str, Any], *, pretrained: bool, stay_in_file: bool = False
) -> nn.Module:
    """Build the model of a repository of the Hugging Face Hub, or of a directory, in transformers' or timm's layout.

    Args:
        name: `user/name`, or a directory with a `config.json`.
        num_classes: Outputs of the classifier.
        options: Keys of transformers' config, or arguments of timm's model.
        pretrained: Load the weights.
        stay_in_file: See `petune.backbones.from_file.build_from_file`.

    Raises:
        MissingExtra: transformers is not installed.
        WeightsUnavailable: There is no such repository or directory, or its weights do not fill the model.
        ConfigError: The model does not accept these options.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtra("a backbone named hf:…", "transformers") from None
    offline = not Path(name).is_dir() and not reachable(hub_url())
    with quiet_transformers():
        try:
            config_file = Path(transformers.utils.cached_file(name, "config.json", local_files_only=offline))
            architecture = repository_architecture(config_file)
            if architecture is not None:
                folder = config_file.parent
                return build_timm_repository(
                    name, architecture, folder, num_classes, options, pretrained=pretrained, stay_in_file=stay_in_file
                )
            load = partial(load_pretrained, stay_in_file=stay_in_file) if pretrained else None
            return _build_transformers(name, num_classes, options, load, offline)
        except OSError as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            needed = (
                "config.json and the weights; weights='none' needs config.json only" if pretrained else "config.json"
            )
            raise WeightsUnavailable(
                f"cannot load {describe(f'hf:{name}', options)}: {reason}. Name a model of the Hugging Face Hub, or a "
                f"directory with {needed}",
                cli_hint="To start from random weights, use --weights none" if pretrained else "",
            ) from error


def _build_transformers(
    name: str, num_classes: int, options: Mapping[str, Any], load: Callable[..., nn.Module] | None, offline: bool
) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForVideoClassification

    config = AutoConfig.from_pretrained(name, local_files_only=offline)
    config = _classification_config(_image_config(config))
    images = getattr(config, "vision_config", None) or config
    options = by_config_key(images, options)
    _check_options(name, images, options)
    try:
        images.update(dict(options))
    except Exception as error:  # some configs check types, with errors that huggingface_hub 0.30 does not have
        raise _not_built(name, options, error) from error
    config.num_labels = num_classes
    # transformers fails on None, which a file leaves, if a config belongs to several models (DeiT)
    config.architectures = config.architectures or []
    for_classes = (AutoModelForImageClassification, AutoModelForVideoClassification)
    auto_class = next((c for c in for_classes if type(config) in c._model_mapping), AutoModel)
    classifies = auto_class is not AutoModel
    if type(config) not in auto_class._model_mapping:
        raise ConfigError(
            f"hf:{name} is a {type(config).__name__}, for which transformers has neither a classifier of images or "
            "videos nor an encoder by itself. Let a function of your own build the model with its classifier: "
            "my_package.models:make"
        )
    try:
        model = auto_class.from_config(config) if load is None else load(auto_class, name, config, offline)
        return _with_logits(model, num_classes, classifies=classifies)
    except (*BUILD_ERRORS, ImportError) as error:
        raise _not_built(name, options, error) from error


def _not_built(name: str, options: Mapping[str, Any], error: Exception) -> ConfigError:
    return ConfigError(f"cannot build {describe(f'hf:{name}', options)}: {' '.join(str(error).split())}")


def _image_config(config: Any) -> Any:
    """Return the config of the image tower of a model with two, unless only both together have a classifier."""
    from transformers import AutoModel, AutoModelForImageClassification

    tower = getattr(config, "vision_config", None)
    alone = any(type(tower) in c._model_mapping for c in (AutoModel, AutoModelForImageClassification))
    if tower is None or (not alone and type(config) in AutoModelForImageClassification._model_mapping):
        return config
    return tower


def _check_options(name: str, config: Any, options: Mapping[str, Any]) -> None:
    """Refuse unknown keys, which transformers accepts silently."""
    for key in options:
        if key != "image_size" and not hasattr(config, key):
            suggestion = did_you_mean(key, config.to_dict())
            raise ConfigError(f"the {type(config).__name__} of hf:{name} has no option {key}{suggestion}")


def _classification_config(config: Any) -> Any:
    """Use a plain ViT for ViT-MAE, whose own model hides random patches in every forward.

    Fine-tuning uses all patches (He et al., 2021, 2111.06377, section 4); the encoder's weights are those of a ViT.
    """
    from transformers import ViTConfig

    return ViTConfig(**config.to_dict()) if config.model_type == "vit_mae" else config
