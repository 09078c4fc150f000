"""Linear probe: only the classifier trains."""

from __future__ import annotations

import petune


class LinearConfig(petune.TunerConfig):
    """A linear probe has no options."""


class Linear(petune.Tuner[LinearConfig]):
    """Linear probe: the backbone is frozen and in eval mode, the classifier trains.

    Parameters: D·C + C for C classes. Differs from the usual protocol: features are computed under augmentation.
    """

    Config = LinearConfig
    recipe = petune.Recipe(lr=5e-3, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Nothing to edit; the head must exist."""
        edit.sites.need_head()

    def count(self, sites: petune.Sites) -> int:
        """None beside the head."""
        return 0
