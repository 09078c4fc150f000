"""Pfeiffer's adapters: a bottleneck MLP after the MLP of every block; and Adapter+.

Legend: D width, M bottleneck.
"""

from __future__ import annotations

from typing import Literal

import petune
from petune.tuners.houlsby import HoulsbyConfig, SequentialAdapter


class PfeifferConfig(HoulsbyConfig):
    """Options of Pfeiffer's adapters.

    Attributes:
        bottleneck: M; the default 64 is AdaptFormer's, to compare them at equal width. Adapter+ has 8.
        dropout: Dropout on the hidden units; none by default.
        position: `intermediate` is after the MLP; `pre` and `post` are in the residual stream, before the MLP's norm
            and after the block. Adapter+ is `post`.
        scale: `channel` learns a factor of each channel, as Adapter+ does; `none` has no factor.
    """

    position: Literal["intermediate", "pre", "post"] = "intermediate"
    scale: Literal["none", "channel"] = "none"


class Pfeiffer(petune.Tuner[PfeifferConfig]):
    """Insert a bottleneck MLP after the MLP of every block.

    Pfeiffer's adapters (Pfeiffer et al., EACL 2021, arXiv 2005.00247), half of Houlsby's, with y = mlp(norm2(x)):

        y = y + GELU(y W_down + b_down) W_up + b_up

    Adapter+ (Steitz & Roth, CVPR 2024, arXiv 2406.06820) is `pfeiffer:position=post,scale=channel,bottleneck=8`, with x
    what leaves the block and s learned for each channel:

        x = x + s · (GELU(x W_down + b_down) W_up + b_up)

    Trains: one adapter per block. Identity at the start: the up-projection is zero.
    Parameters: 2·D·M + M + D per block, D more with scale=channel. ViT-B/16, M = 64: 1,189,632; Adapter+: 165,984.

    With position=intermediate the adapter comes before LayerScale (which starts at 1e-5 in DINOv2 and at 1e-6 in
    DeiT-3), drop path and the residual sum, as Houlsby's do here.

    Differs from the paper: in a post-norm transformer the adapter is between the MLP's residual sum and its norm; in a
    pre-norm ViT it comes after the MLP. The code of Adapter+ (github.com/visinf/adapter_plus) calls another method
    `pfeiffer`: there the adapter reads a new LayerNorm of the residual stream after the MLP, and its output is added to
    the MLP's. What is called `pfeiffer` here is their `intermediate`, but for LayerScale and drop path, which they
    apply before the adapter. `pre` and `post` are theirs, but for drop path in the adapter and an up-projection that
    starts at zero instead of N(0, 0.01²).
    """

    recipe = petune.Recipe(lr=1e-3, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Put one adapter at every block."""
        config = self.config
        for block in edit.sites.require_blocks():
            scales = config.scale == "channel"
            adapter = SequentialAdapter(block.dim, config.bottleneck, config.dropout, scales_channels=scales)
            if config.position == "pre":
                edit.stream(block.mid, adapter)
            else:
                edit.after(block if config.position == "post" else block.mlp, adapter)

    def num_parameters(self, sites: petune.Sites) -> int:
        """Return 2·D·M + M + D per block, and D for a factor of each channel."""
        m, num_vectors = self.config.bottleneck, 2 if self.config.scale == "channel" else 1
        return sum(2 * block.dim * m + m + num_vectors * block.dim for block in sites.blocks)
