"""Norm tuning (LN-Tune: Basu et al., "Strong Baselines for Parameter-Efficient Few-Shot Fine-Tuning", AAAI 2024,
arXiv 2304.01917).

LayerNorm(x) = g · x̂ + b        g and b train, all else is frozen
"""

from __future__ import annotations

from torch import nn

import petune


class NormConfig(petune.TunerConfig):
    """Norm tuning has no options."""


class Norm(petune.Tuner[NormConfig]):
    """Scale and shift of every normalisation train. Merging keeps them, they are the backbone's own.

    Parameters: 4·D a block (two norms), 2·D for the final one. ViT-B/16: 38,400.

    Differs from the paper: every kind of normalisation trains, not LayerNorm alone; running statistics of a BatchNorm
    stay as they are, as all that is frozen.
    """

    recipe = petune.Recipe(lr=1e-2, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Unfreeze the parameters of every normalisation."""
        edit.train(p for module in edit.backbone() if is_norm(module) for p in module.parameters())


def is_norm(module: nn.Module) -> bool:
    """Whether a module divides by a guarded deviation (hence its `eps`, or its name) and scales by vectors."""
    named = "norm" in type(module).__name__.lower()
    guarded = hasattr(module, "eps") or hasattr(module, "variance_epsilon") or named
    own = [*module.parameters(recurse=False)]  # timm's with an activation hold it as a child
    return guarded and len(own) == len([*module.parameters()]) and all(p.ndim == 1 for p in own)
