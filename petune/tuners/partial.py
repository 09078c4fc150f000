"""Partial fine-tuning: the last blocks train."""

from __future__ import annotations

from pydantic import Field

import petune


class PartialConfig(petune.TunerConfig):
    """Options of partial fine-tuning.

    Attributes:
        num_blocks: k, counted from the output. The default 1 is that of VPT's comparison.
    """

    num_blocks: int = Field(1, ge=1)


class Partial(petune.Tuner[PartialConfig]):
    """Train the last k blocks and the final norm.

    Partial fine-tuning (Yosinski et al., NeurIPS 2014, arXiv 1411.1792; for ViTs: MAE, arXiv 2111.06377, figure 9).

    Trains: the last k blocks and the final norm; they are in train mode. Every block trains if there are fewer than k.
    The blocks before are frozen, so the backward pass ends at block L - k.
    Parameters: 12·D² + 13·D per block with an MLP of 4·D, and 2·D for the norm. ViT-B/16, k = 1: 7,089,408.
    """

    recipe = petune.Recipe(lr=5e-4, weight_decay=0.05)

    def attach(self, edit: petune.Edit) -> None:
        """Unfreeze whole blocks, by position: a part of a name would take block 10 for block 1."""
        for block in edit.sites.require_blocks()[-self.config.num_blocks :]:
            edit.train(block)
        if "norm" in edit.sites.parts:
            edit.train(edit.sites.norm)
