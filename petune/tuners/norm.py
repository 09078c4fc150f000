"""Norm tuning: only the backbone's normalizations train."""

from __future__ import annotations

import warnings

from torch import nn

import petune


class NormConfig(petune.TunerConfig):
    """Norm tuning has no options."""


class Norm(petune.Tuner[NormConfig]):
    """Train scale and shift of the backbone's normalizations only.

    LN-Tune (Basu et al., AAAI 2024, arXiv 2304.01917, "Strong Baselines for Parameter-Efficient Few-Shot Fine-Tuning"):

        LayerNorm(x) = g · x̂ + b        g and b train, everything else is frozen

    Trains: g and b of every normalization, in place; merging keeps them.
    Parameters: 4·D per block (two norms), 2·D for the final one. ViT-B/16: 38,400.

    Differs from the paper: every kind of normalization trains, not LayerNorm alone, also one that is a function
    (`F.layer_norm` with parameters of a block). The running statistics of a BatchNorm stay as they are, as everything
    frozen does.
    """

    recipe = petune.Recipe(lr=1e-2, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Unfreeze the parameters of every normalization that the forward uses."""
        sites = edit.sites
        found = [
            *(n for block in sites.blocks for n in block.norms),
            *(n for tower in sites.towers for n in tower.norms),
        ]
        known = {module for norm in found for module in norm.modules}
        backbone = dict.fromkeys(edit.backbone())
        norms = [module for module in backbone if is_norm(module) or module in known]
        taken = [getattr(module, name) for module, name in sites.layers.norms if module in backbone]
        trained = dict.fromkeys([*(p for module in norms for p in module.parameters()), *taken])
        edit.train(edit.used(trained))
        own = ((b.path, {p for module in b.own_modules for p in module.parameters()}) for b in sites.blocks)
        bare = [path for path, parameters in own if parameters.isdisjoint(trained)]
        if bare and trained:
            warnings.warn(
                f"norm trains nothing in {len(bare)} of {len(sites.blocks)} blocks ({bare[0]}, …): petune found no "
                "module there that normalizes and has parameters",
                stacklevel=2,
            )


def is_norm(module: nn.Module) -> bool:
    """Return True if a module divides by a guarded deviation (`eps`, or a name that says so) and scales by vectors.

    A norm without weights inside of it may divide.
    """
    named = "norm" in type(module).__name__.lower()
    guarded = [m for m in module.modules() if hasattr(m, "eps") or hasattr(m, "variance_epsilon")]
    every, own = [*module.parameters()], [*module.parameters(recurse=False)]
    holds_all = len(own) == len(every)  # timm's norms with an activation hold that as a child
    is_around = bool(guarded) and not any(True for m in guarded for _ in m.parameters())
    return (named or bool(guarded)) and (holds_all or is_around) and all(map(is_vector, every))


def is_vector(parameter: nn.Parameter) -> bool:
    """Return whether a parameter has one number for each channel."""
    return sum(side > 1 for side in parameter.shape) <= 1
