"""Find a backbone's sites and the size of its input."""

from __future__ import annotations

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
    if height != width:
        raise ConfigError(f"the input is {height}×{width}, not square. Give image_size", cli_hint=ASK_FOR_SIZE)
    return int(width)
