"""Several adapters of one PEFT type at a layer, where one layer of PEFT's cannot hold them.

Such an adapter gets layers of its own around those of the adapters before it. Layers that add to what the layer inside
returns work together. For the others, only one adapter can be enabled at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from petune.tuners.peft_bridge.layer import peft_layers
from petune.tuners.peft_bridge.shared_modules import put_in_all_places

OWN_LAYERS = {"c3a", "frod", "ln_tuning", "osf", "pvera", "randlora", "tinylora", "unilora", "vblora", "vera"}
"""Types of which a layer cannot hold two adapters: they share tensors through PEFT's model, or only one can act."""

ONE_AT_A_TIME = {"frod", "ln_tuning"}
"""Those of them whose layer does not call the layer inside."""

ONE_IN_A_LAYER = {"hra", "shira", "supertuning"}
"""Types of which a layer holds several adapters, but PEFT does not attach a second one while the first is enabled."""


@contextmanager
def hidden_layers(model: nn.Module) -> Iterator[None]:
    """Take PEFT's layers out of a model inside the context, and put them inside the new ones that PEFT makes there."""
    hidden = {path: layer for path, layer in peft_layers(model).items() if "base_layer" not in path.split(".")}
    configs: dict[str, Any] = model.__dict__.pop("peft_config", {})
    for layer in hidden.values():
        put_in_all_places(model, layer, layer.get_base_layer())
    try:
        yield
    finally:
        new_layers = peft_layers(model)
        for path, layer in hidden.items():
            if path in new_layers:
                new_layers[path].base_layer = layer
            else:
                put_in_all_places(model, layer.get_base_layer(), layer)
        configs.update(model.__dict__.get("peft_config", {}))
        if configs:
            model.peft_config = configs  # type: ignore[assignment]
