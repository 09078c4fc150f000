"""Modules that a model has in several places, such as one linear layer that two blocks share.

PEFT puts its layer in the first of these places only; petune puts it in all of them, so that the adapter is shared too.
"""

from __future__ import annotations

from torch import nn


def put_in_all_places(model: nn.Module, old: nn.Module, new: nn.Module) -> int:
    """Replace a module by another one wherever the model has it, but not inside the new one.

    Args:
        model: The model.
        old: The module to take out.
        new: The module to put in.

    Returns:
        The number of places where the old one was.
    """
    inside = set(new.modules())
    num_places = 0
    for parent in [m for m in model.modules() if m not in inside]:
        for name in [name for name, child in parent._modules.items() if child is old]:
            setattr(parent, name, new)
            num_places += 1
    return num_places
