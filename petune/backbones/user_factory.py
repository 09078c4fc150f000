"""Build a model with a function of the user, named as `package.module:factory`."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from petune.backbones.timm_models import BUILD_ERRORS, describe
from petune.base.errors import AttachError, ConfigError
from petune.sites.logits import logits_of, synthetic_logits
from petune.sites.sites import Sites


def build_with_factory(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    """Call the user's factory.

    Args:
        name: `package.module:factory`; the current directory is searched as well.
        num_classes: Passed if the factory has a parameter of that name; the classifier is replaced afterwards.
        options: Passed to the factory; `image_size` and `num_frames` only if it has parameters of these names.

    Raises:
        ConfigError: The import fails, the factory does not accept the options, or does not return a module.
    """
    with _current_directory_importable():
        factory = _import_factory(name)
        arguments = _accepted(factory, {"num_classes": num_classes, **options})
        try:
            model = factory(**arguments)
        except BUILD_ERRORS as error:
            raise ConfigError(f"{describe(name, options)} failed: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{name} returned {type(model).__name__}, not an nn.Module. Let the factory return the model alone"
        )
    return model


def return_logits(name: str, model: nn.Module, sites: Sites, num_classes: int) -> None:
    """Let a user's model return its logits as a tensor, also if its forward returns them in a dict, object or tuple.

    Raises:
        ConfigError: The forward returns no tensor, or one that is not (images, classes).
    """
    try:
        logits: Tensor = synthetic_logits(model, sites)
    except AttachError as error:
        raise ConfigError(f"{name}: {error}") from error
    if tuple(logits.shape) != (2, num_classes):
        raise ConfigError(
            f"the model of {name} returns a tensor of shape {tuple(logits.shape)} for 2 images, instead of logits of "
            f"shape (2, {num_classes}). Let its forward return the logits as a tensor, as `logits` of an object or "
            "dict, or first in a tuple"
        )
    model.register_forward_hook(_logits_alone)


def _logits_alone(model: nn.Module, args: Any, output: Any) -> Tensor:
    """Forward hook: return the logits (B, C) of what a forward returned."""
    return logits_of(output)


def _import_factory(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"cannot import the backbone {name}: {error}. It must name a function that returns a model, as "
            "package.module:factory"
        ) from error


def _accepted(factory: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Drop `num_classes`, `image_size` and `num_frames` if the factory has no such parameter."""
    parameters = inspect.signature(factory).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(arguments)
    dropped = {"num_classes", "image_size", "num_frames"} - parameters.keys()
    return {key: value for key, value in arguments.items() if key not in dropped}


@contextlib.contextmanager
def _current_directory_importable() -> Iterator[None]:
    """Search the current directory for modules, which a console script does not do by itself."""
    directory = str(Path.cwd())
    if directory in sys.path:
        yield
        return
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(directory)
