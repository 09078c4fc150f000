"""Pfeiffer's adapters: a bottleneck MLP after the MLP of every block.

Legend: D width, M bottleneck.
"""

from __future__ import annotations

import petune
from petune.tuners.houlsby import HoulsbyConfig, SequentialAdapter


class PfeifferConfig(HoulsbyConfig):
    """Options of Pfeiffer's adapters.

    Attributes:
        bottleneck: M; the default 64 is AdaptFormer's, to compare them at equal width.
        dropout: Dropout on the hidden units; none by default.
    """


class Pfeiffer(petune.Tuner[PfeifferConfig]):
    """Insert a bottleneck MLP after the MLP of every block.

    Pfeiffer's adapters (Pfeiffer et al., EACL 2021, arXiv 2005.00247), half of Houlsby's, with y = mlp(norm2(x)):

        y = y + GELU(y W_down + b_down) W_up + b_up

    Trains: one adapter per block. Identity at the start: the up-projection is zero.
    Parameters: 2·D·M + M + D per block. ViT-B/16, M = 64: 1,189,632.

    The adapter comes before LayerScale (which starts at 1e-5 in DINOv2 and at 1e-6 in DeiT-3), drop path and the
    residual sum, as Houlsby's do here.

    Differs from the paper: in a post-norm transformer the adapter is between the MLP's residual sum and its norm; in a
    pre-norm ViT it comes after the MLP. The code of Adapter+ (Steitz & Roth, CVPR 2024, github.com/visinf/adapter_plus)
    calls another method `pfeiffer`: there the adapter reads a new LayerNorm of the residual stream after the MLP, and
    its output is added to the MLP's. What is called `pfeiffer` here is their `intermediate`, but for LayerScale and
    drop path, which they apply before the adapter.
    """

    recipe = petune.Recipe(lr=1e-3, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Put one adapter after every MLP."""
        for block in edit.sites.require_blocks():
            adapter = SequentialAdapter(block.dim, self.config.bottleneck, self.config.dropout)
            edit.after(block.mlp, adapter)

    def num_parameters(self, sites: petune.Sites) -> int:
        """Return 2·D·M + M + D per block."""
        m = self.config.bottleneck
        return sum(2 * block.dim * m + m + block.dim for block in sites.blocks)
