"""Sequential adapters, one a block (Pfeiffer et al., EACL 2021, arXiv 2005.00247): behind the MLP only.

    y = mlp(norm2(x)):  y = y + GELU(y W_down + b_down) W_up + b_up

Legend: D width, M bottleneck.
"""

from __future__ import annotations

import petune
from petune.tuners.houlsby import HoulsbyConfig, SequentialAdapter


class PfeifferConfig(HoulsbyConfig):
    """The options of Houlsby's adapters."""


class Pfeiffer(petune.Tuner[PfeifferConfig]):
    """Pfeiffer's adapters: half of Houlsby's. Identity at the start.

    Parameters: 2·D·M + M + D a block. ViT-B/16, M = 64: 1,189,632.

    Differs from the paper: in a post-norm transformer the adapter stands between the MLP's residual sum and its
    norm; in a pre-norm ViT it stands behind the MLP, as in the comparisons of the ViT literature.
    """

    recipe = petune.Recipe(lr=1e-3, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """One adapter a block."""
        for block in edit.sites.require_blocks():
            adapter = SequentialAdapter(block.dim, self.config.bottleneck, self.config.dropout)
            edit.after(block.mlp, adapter)

    def num_parameters(self, sites: petune.Sites) -> int:
        """2·D·M + M + D a block."""
        m = self.config.bottleneck
        return sum(2 * block.dim * m + m + block.dim for block in sites.blocks)
