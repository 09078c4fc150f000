"""Partial fine-tuning (Yosinski et al., NeurIPS 2014, arXiv 1411.1792; for ViTs: MAE, arXiv 2111.06377, figure 9).

The last k blocks and the final norm train, the blocks before are frozen, so that backward ends at block L - k.
"""

from __future__ import annotations

from pydantic import Field

import petune


class PartialConfig(petune.TunerConfig):
    """Options of partial fine-tuning.

    Attributes:
        num_blocks: k, counted from the output; 1 as in VPT's comparison.
    """

    num_blocks: int = Field(1, ge=1)


class Partial(petune.Tuner[PartialConfig]):
    """The last k blocks and the final norm train, in train mode. All blocks where the model has fewer than k.

    Parameters: 12·D² + 13·D a block with an MLP of 4·D, and 2·D for the norm. ViT-B/16, k = 1: 7,089,408.
    """

    recipe = petune.Recipe(lr=5e-4, weight_decay=0.05)

    def attach(self, edit: petune.Edit) -> None:
        """Unfreeze whole blocks: chosen by their place, so that block 1 is not block 10."""
        for block in edit.sites.require_blocks()[-self.config.num_blocks :]:
            edit.train(block)
        if "norm" in edit.sites.parts:
            edit.train(edit.sites.norm)
