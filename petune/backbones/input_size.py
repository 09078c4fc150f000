"""Find a backbone's sites and the size of its input, and check the sizes that a user asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from petune.base.errors import AttachError, ConfigError
from petune.sites.find import find_sites
from petune.sites.sites import Sites

ASK_FOR_SIZE = "Set it with --image-size"


def backbone_sites(model: nn.Module) -> Sites:
    """Find the sites of a backbone.

    Raises:
        ConfigError: Its forward fails, usually because of the image size.
    """
    try:
        return find_sites(model)
    except AttachError as error:
        raise ConfigError(f"{error}. Try another image_size", cli_hint=ASK_FOR_SIZE) from error


def square_input(sites: Sites) -> int:
    """Return the side of the input in pixels.

    Raises:
        ConfigError: The input is not square.
    """
    height, width = sites.input_size[-2:]
    return _square(height, width)


def _square(height: int, width: int) -> int:
    if height != width:
        raise ConfigError(f"the input is {height}×{width}, not square. Give image_size", cli_hint=ASK_FOR_SIZE)
    return int(width)


def side_option(options: Mapping[str, Any], key: str) -> int | None:
    """Return the side of the square input, in pixels, that a backbone's options ask for; None if they do not.

    Args:
        options: Arguments of the model.
        key: `img_size` or `image_size`: a number, or height and width.

    Raises:
        ConfigError: The option is none of these, or the input is not square.
    """
    if key not in options:
        return None
    size = options[key]
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(map(_is_count, sides)):
        raise ConfigError(f"{key} is {size!r}. Give the side of the square input as a whole number of pixels above 0")
    return _square(*sides)


def check_patch_size(options: Mapping[str, Any]) -> None:
    """Check the patch size that a backbone's options ask for: a number, or one for each side (and frames).

    Raises:
        ConfigError: It is none.
    """
    size = options.get("patch_size", 1)
    sides = size if isinstance(size, list | tuple) else (size,)
    if not 1 <= len(sides) <= 3 or not all(map(_is_count, sides)):
        raise ConfigError(f"patch_size is {size!r}. Give a whole number of pixels above 0, or one for each side")


def frames_option(options: Mapping[str, Any]) -> int | None:
    """Return the frames of a clip that a backbone's options ask for; None if they do not.

    Raises:
        ConfigError: They are no number.
    """
    frames = options.get("num_frames")
    if "num_frames" in options and not _is_count(frames):
        raise ConfigError(f"num_frames is {frames!r}. Give a whole number of frames above 0")
    return frames


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
