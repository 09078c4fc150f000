"""Models of the Hugging Face Hub in timm's own layout, as `timm.create_model("hf-hub:…")` reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from petune.base.errors import ConfigError, UnknownName, WeightsUnavailable
from petune.base.hub import HubFile, overlay


def timms_architecture(config_file: Path) -> str | None:
    """Which model of timm's a `config.json` names; None where it is transformers'."""
    said = json.loads(config_file.read_bytes())
    return None if "model_type" in said else said.get("architecture")


def build_timms(
    name: str, architecture: str, place: Path, num_classes: int, options: dict[str, Any], *, pretrained: bool
) -> nn.Module:
    """Build the model that a repository, or a directory, describes.

    Args:
        name: Of the repository or directory.
        architecture: As its `config.json` says.
        place: Where that lies; the weights are beside it, or are fetched to there.
        num_classes: Of the classifier.
        options: Arguments of timm's, and `image_size`.
        pretrained: Load the weights: all of them, position embeddings resampled, or none.

    Raises:
        UnknownName: timm does not know the architecture.
        ConfigError: It does not take these options.
        WeightsUnavailable: They cannot be had, or do not fill the model.
    """
    import timm

    if not timm.is_model(architecture):
        raise UnknownName("timm model", architecture, timm.list_models(), f"It is named in {place / 'config.json'}")
    if pretrained and not Path(name).is_dir():
        place = Path(overlay(f"hf:{name}", HubFile(name))["file"]).parent
    settings = {"img_size" if key == "image_size" else key: value for key, value in options.items()}
    try:
        # with its own classifier: timm lets anything be missing where it is to leave that out
        model: nn.Module = timm.create_model(f"local-dir:{place}", pretrained=pretrained, **settings)
    except RuntimeError as error:
        raise WeightsUnavailable(
            f"the weights of hf:{name} must fill timm's {_shown(architecture, options)}, but: {_short(error)}"
        ) from None
    except (TypeError, AssertionError, ValueError, AttributeError) as error:
        raise ConfigError(f"timm's {_shown(architecture, options)} cannot be built: {_short(error)}") from None
    if model.num_classes != num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
    return model


def _shown(architecture: str, options: dict[str, Any]) -> str:
    return f"{architecture} with " + (", ".join(f"{k}={v}" for k, v in options.items()) or "no options")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
