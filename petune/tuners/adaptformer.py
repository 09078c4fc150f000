"""AdaptFormer: a bottleneck MLP in parallel to the MLP of every block.

Legend: B batch, N tokens, D width, M bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class AdaptFormerConfig(petune.TunerConfig):
    """Options of AdaptFormer.

    Attributes:
        bottleneck: M; the paper's 64.
        scale: s, a number or `learnable`, which starts at 1.0. By default the paper's 0.1; `learnable` in the variant
            `paddle_study`.
        dropout: Dropout on the hidden units; the authors' 0.1.
        input: `residual` reads the residual stream, as the authors' code does; `norm` reads what enters the MLP. By
            default `residual`; `norm` in the variant `paddle_study`.
        variant: `official` is the authors' code. `paddle_study` is a reproduction in PaddlePaddle: input `norm`,
            learnable scale, added to the MLP's output and so inside drop path (and LayerScale, if there is one).
        train_backbone: Train the backbone too, as the second row of its table does, and its pretraining, in which the
            adapters exist from the start.
    """

    bottleneck: int = Field(64, ge=1)
    scale: Annotated[float, Field(gt=0)] | Literal["learnable"] | None = None
    dropout: float = Field(0.1, ge=0, lt=1)
    input: Literal["residual", "norm"] | None = None
    variant: Literal["official", "paddle_study"] = "official"
    train_backbone: bool = False

    @property
    def initial_scale(self) -> float | Literal["learnable"]:
        """The scale, with the variant's default filled in."""
        if self.scale is not None:
            return self.scale
        return "learnable" if self.variant == "paddle_study" else 0.1

    @property
    def source(self) -> Literal["residual", "norm"]:
        """The input, with the variant's default filled in."""
        if self.input is not None:
            return self.input
        return "norm" if self.variant == "paddle_study" else "residual"


class BottleneckAdapter(nn.Module):
    """s · (dropout(ReLU(x W_down + b_down)) W_up + b_up), zero at the start."""

    why_not_mergeable = "its ReLU is not linear"

    def __init__(self, dim: int, bottleneck: int, dropout: float, scale: float | Literal["learnable"]) -> None:
        super().__init__()
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        self.dropout = nn.Dropout(dropout)
        self.scale: nn.Parameter | float = nn.Parameter(torch.ones(1)) if scale == "learnable" else float(scale)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        hidden_BNM = self.dropout(torch.relu(self.down(x_BND)))
        change_BND: Tensor = self.up(hidden_BNM) * self.scale
        return change_BND


class AdaptFormer(petune.Tuner[AdaptFormerConfig]):
    """Add a bottleneck MLP in parallel to the MLP of every block.

    AdaptFormer (Chen et al., NeurIPS 2022, arXiv 2205.13535), with the residual stream x after the attention:

        a = s · (dropout(ReLU(x W_down + b_down)) W_up + b_up)
        x = x + drop_path(mlp(norm2(x))) + a

    Trains: one adapter per block. Identity at the start: the up-projection is zero.
    Parameters: 2·D·M + M + D per block, one more with a learnable scale. ViT-B/16, M = 64: 1,189,632.

    Differs from the paper: figure and equation show norm2's output as the input; the authors' code reads the raw
    residual stream, and they say that the code is right, so that is the default here. The paper's blocks are pre-norm;
    in a block that normalizes the sum (torch's default), the sum includes a: norm2(x + mlp(x) + a), and a fixed factor
    of the MLP (Conformer's 0.5) multiplies a, too. Where no stream between attention and MLP is known (several lanes),
    `input=norm` adds to the MLP's output. A frozen backbone is in eval mode, without drop path; `--drop-path 0.1` lets
    it act, as in papers that train with it.

    Recipe: the upper end of the published grid (AdamW, 5e-4 to 5e-3). With vit_nano on 10,000 images of CIFAR-10 (2
    epochs, batch 128, seed 0) top-1 on val was 70.88 at 6e-3 and 70.04 at 2e-2. The authors' own script trains image
    models differently, which is the recipe `official` (`--recipe official`): SGD with momentum 0.9, learning rate
    0.1 · batch / 256, no weight decay, 100 epochs with 20 of warm-up, and a BatchNorm without affine parameters before
    the linear classifier (`--head bn_linear`). What you give yourself, such as `--epochs 10`, is not changed.
    Their script for videos (`--recipe video`) differs: no dropout in the adapter, 90 epochs with 10 of warm-up. It also
    trains the norm before that BatchNorm, which undoes whatever a scale and a shift there would do.
    """

    recipe = petune.Recipe(lr=5e-3)
    recipes: ClassVar[Mapping[str, petune.Recipe]] = {
        "official": petune.Recipe(
            lr=0.05, scales_lr=True, optimizer="momentum", epochs=100, warmup=0.2, head="bn_linear"
        ),
        "video": petune.Recipe(
            lr=0.05,
            scales_lr=True,
            optimizer="momentum",
            epochs=90,
            warmup=10 / 90,
            head="bn_linear",
            options={"dropout": 0.0},
        ),
    }

    def attach(self, edit: petune.Edit) -> None:
        """Put one adapter beside the MLP of every block."""
        config = self.config
        if config.train_backbone:
            edit.train(edit.model)
        for block in edit.sites.require_blocks():
            adapter = BottleneckAdapter(_width(block), config.bottleneck, config.dropout, config.initial_scale)
            enter = block.mid if config.source == "residual" else _mlp_of(block)
            is_stream = "mid" in block.parts  # else what leaves the block may be no sum with the MLP's output
            inside = block.changes_sum or not is_stream
            if inside and config.variant == "official":
                _require_unscaled(block)
            exit = block.mlp if inside or config.variant == "paddle_study" else block
            edit.parallel(enter, exit, adapter)

    def num_parameters(self, sites: petune.Sites) -> int | None:
        """Return 2·D·M + M + D per block, and its learnable scale; None if the backbone trains too."""
        if self.config.train_backbone:
            return None
        m, num_scales = self.config.bottleneck, int(self.config.initial_scale == "learnable")
        return sum(2 * d * m + m + d + num_scales for d in map(_width, sites.blocks))


def _mlp_of(block: petune.Block) -> petune.Site:
    """Return the MLP of a block, if it keeps the width of its tokens.

    Raises:
        AttachError: It does not.
    """
    mlp, norm = block.mlp, block.parts.get("norm2", block.mlp)
    if norm.dim != mlp.dim:
        raise petune.AttachError(
            f"the MLP of block {block.index} ({mlp.where}) of {mlp.model} takes tokens of width {norm.dim} and returns "
            f"{mlp.dim}, so no adapter can be parallel to it. Use lora, or leave the block out with blocks="
        )
    return mlp


def _require_unscaled(block: petune.Block) -> None:
    """Check that what is added to the MLP's output is not multiplied by a LayerScale, which can be 1e-5.

    Raises:
        AttachError: It is.
    """
    if block.scales_mlp:
        raise petune.AttachError(
            f"block {block.index} ({block.where}) of {block.model} multiplies its MLP's output by numbers before it "
            "adds it, and an adapter that adds to that output would be multiplied, too. Use "
            "adaptformer:variant=paddle_study, in which it is, or lora"
        )


def _width(block: petune.Block) -> int:
    """Return the width of what an adapter reads; lanes side by side make a stream wider than its MLP."""
    return block.dim if "mid" in block.parts or "mlp" not in block.parts else block.mlp.dim
