"""BitFit: only the backbone's biases train."""

from __future__ import annotations

from torch import nn

import petune


class BitFitConfig(petune.TunerConfig):
    """BitFit has no options."""


class BitFit(petune.Tuner[BitFitConfig]):
    """Train the backbone's biases only.

    BitFit (Ben Zaken et al., ACL 2022, arXiv 2106.10199):

        y = W x + b,  LayerNorm(x) = g · x̂ + b        b trains, W and g do not

    Trains: every bias of the backbone, in place; merging keeps them.
    Parameters: 11·D for a block of width D with an MLP of 4·D (norms 2·D, qkv 3·D, proj D, MLP 5·D), and D each for
    patch embedding and final norm. ViT-B/16: 102,912.

    Differs from the paper: nothing. All layers count, the patch embedding too. Biases are recognized by what they are,
    not by a part of their name: what a linear layer, a convolution or a norm takes as its bias is one, by any name, and
    a `relative_position_bias_table` is not. Neither is a single number of a
    contrastive loss, such as SigLIP's `logit_bias`: it shifts all logits alike and belongs to no layer. Of petune's
    methods only `full` trains it, and CLIP's `logit_scale`.
    """

    recipe = petune.Recipe(lr=1e-2, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Unfreeze every bias vector that the forward uses."""
        backbone = dict.fromkeys(edit.backbone())
        taken = [getattr(module, name) for module, name in edit.sites.layers.biases if module in backbone]
        named = [bias for module in backbone for bias in biases_of(module)]
        edit.train(edit.used(dict.fromkeys([*named, *taken])))


def biases_of(module: nn.Module) -> list[nn.Parameter]:
    """Return the module's own bias vectors: `bias`, and `q_bias`, `in_proj_bias`, … of a fused layer."""
    own = [(name, p) for name, p in module.named_parameters(recurse=False) if p.ndim == 1]
    is_layer = any(p.ndim > 1 for p in module.parameters(recurse=False))
    return [p for name, p in own if name == "bias" or (name.endswith("_bias") and (is_layer or p.numel() > 1))]
