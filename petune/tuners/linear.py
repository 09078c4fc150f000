"""Linear probe: only the classifier trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import petune


class LinearConfig(petune.TunerConfig):
    """A linear probe has no options."""


class Linear(petune.Tuner[LinearConfig]):
    """Train the classifier only (a linear probe).

    Trains: the classifier alone; the backbone is frozen and in eval mode.
    Parameters: none besides the classifier's D·C + C for C classes.

    Differs from the usual protocol: features are computed under augmentation.

    Recipe: with vit_nano on 10,000 images of CIFAR-10 (2 epochs, batch 128, AdamW, seed 0) top-1 on val was 67.02 at
    5e-3 and 67.12 at 2e-2. AdaptFormer's authors train their linear probe of videos with SGD, as their adapters, which
    is the recipe `video` (`--recipe video`): learning rate 0.1 · batch / 256, no weight decay, 90 epochs with 10 of
    warm-up, a BatchNorm without affine parameters before the classifier.
    """

    recipe = petune.Recipe(lr=1e-2)
    recipes: ClassVar[Mapping[str, petune.Recipe]] = {
        "video": petune.Recipe(
            lr=0.05, scales_lr=True, optimizer="momentum", epochs=90, warmup=10 / 90, head="bn_linear"
        ),
    }

    def attach(self, edit: petune.Edit) -> None:
        """Edit nothing: `petune.attach` trains the classifier."""

    def num_parameters(self, sites: petune.Sites) -> int:
        """Return 0: nothing trains besides the classifier."""
        return 0
