"""Full fine-tuning: everything trains."""

from __future__ import annotations

import petune


class FullConfig(petune.TunerConfig):
    """Full fine-tuning has no options."""


class Full(petune.Tuner[FullConfig]):
    """Full fine-tuning: every parameter trains, every module is in train mode.

    Parameters: all. The other methods are measured against it.
    """

    Config = FullConfig
    recipe = petune.Recipe(lr=2e-4, weight_decay=0.05)

    def attach(self, edit: petune.Edit) -> None:
        """Unfreeze the whole model."""
        edit.train(edit.model)
