"""Find weights that a checkpoint did not fill, where the model still says so."""

from __future__ import annotations

from torch import nn

FLAG = "_is_hf_initialized"
"""Set by transformers on each parameter that `from_pretrained` has filled from the checkpoint."""


def new_weights(model: nn.Module) -> list[str]:
    """Return the keys of parameters that `from_pretrained` of transformers left at random values.

    Mask tokens, which only pretraining uses, are left out. Empty for a model that does not say what was filled.
    """
    named = dict(model.named_parameters())
    if not any(getattr(p, FLAG, False) for p in named.values()):
        return []
    return [key for key, p in named.items() if not getattr(p, FLAG, False) and not key.endswith("mask_token")]
