"""BitFit (Ben Zaken et al., ACL 2022, arXiv 2106.10199): only the backbone's biases train.

y = W x + b,  LayerNorm(x) = g · x̂ + b        b trains, W and g do not
"""

from __future__ import annotations

from torch import nn

import petune


class BitFitConfig(petune.TunerConfig):
    """BitFit has no options."""


class BitFit(petune.Tuner[BitFitConfig]):
    """BitFit. Merging keeps the trained biases, which are the backbone's own.

    Parameters: 11·D for a block of D with an MLP of 4·D (norms 2·D, qkv 3·D, proj D, MLP 5·D), and D each for patch
    embedding and final norm. ViT-B/16: 102,912.

    Differs from the paper: nothing; biases of all layers, those of the patch embedding too. They are chosen by
    what they are, so a `relative_position_bias_table` is none.
    """

    recipe = petune.Recipe(lr=1e-2, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Unfreeze every bias vector."""
        edit.train(bias for module in edit.backbone() for bias in biases_of(module))


def biases_of(module: nn.Module) -> list[nn.Parameter]:
    """The module's own bias vectors: `bias`, and where a fused layer has several, `q_bias`, `in_proj_bias`."""
    own = module.named_parameters(recurse=False)
    return [p for name, p in own if p.ndim == 1 and (name == "bias" or name.endswith("_bias"))]
