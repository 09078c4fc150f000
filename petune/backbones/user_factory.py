"""Build a model with a function of the user, named as `package.module:factory`."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from petune.backbones.timm_models import describe
from petune.base.errors import ConfigError


def build_with_factory(name: str, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    """Call the user's factory.

    Args:
        name: `package.module:factory`; the current directory is searched as well.
        num_classes: Passed if the factory has a parameter of that name; the classifier is replaced afterwards.
        options: Passed to the factory; `image_size` only if it has a parameter of that name.

    Raises:
        ConfigError: The import fails, the factory does not accept the options, or does not return a module.
    """
    with _current_directory_importable():
        factory = _import_factory(name)
        arguments = _accepted(factory, {"num_classes": num_classes, **options})
        try:
            model = factory(**arguments)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"{describe(name, options)} failed: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned a {type(model).__name__}, not an nn.Module")
    return model


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
    """Drop `num_classes` and `image_size` if the factory has no such parameter."""
    parameters = inspect.signature(factory).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(arguments)
    dropped = {"num_classes", "image_size"} - parameters.keys()
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
