"""The options of a backbone that drop activations, tokens or whole branches at random while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from petune.backbones.names import calls_user_code
from petune.base.errors import ConfigError


def drop_path_key(name: str) -> str:
    """Return the option by which a backbone is built with drop path (stochastic depth).

    Raises:
        ConfigError: The backbone is built by the user's own function.
    """
    if calls_user_code(name):
        raise ConfigError(
            f"drop_path is not available for {name}: your function decides what it is called. Pass it to the function "
            "in backbone_options, such as backbone_options={'drop_path_rate': 0.1}",
            cli_hint="--set backbone_options.drop_path_rate=0.1",
        )
    return "stochastic_depth_prob" if name.startswith("torchvision:") else "drop_path_rate"


def drop_rates(options: Mapping[str, Any]) -> dict[str, float]:
    """Return the options that set a rate of dropout or drop path above zero."""
    return {
        key: value
        for key, value in options.items()
        if ("drop" in key or "stochastic_depth" in key) and isinstance(value, int | float) and value > 0
    }
