"""RepAdapter: a linear bottleneck before attention and MLP, which merges into the layers that read it.

Legend: B batch, N tokens, D width, M bottleneck, G groups.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import petune


class RepAdapterConfig(petune.TunerConfig):
    """Options of RepAdapter.

    Attributes:
        bottleneck: M; the paper's 8.
        groups: G of the up-projection; the paper's 2. Must divide M and the width.
        scale: s; the paper searches 0.1 to 10 on each dataset, and 1 is the middle of that.
        dropout: Dropout on the hidden units; the authors' 0.1.
    """

    bottleneck: int = Field(8, ge=1)
    groups: int = Field(2, ge=1)
    scale: float = Field(1.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.bottleneck % self.groups:
            raise ValueError(f"bottleneck={self.bottleneck} is no multiple of groups={self.groups}")
        return self


class LinearAdapter(nn.Module):
    """x + s · up(down(x)), the identity at the start; `merge` folds it into `input_layers`, the layers that read x."""

    def __init__(self, dim: int, config: RepAdapterConfig, input_layers: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.down = nn.Linear(dim, config.bottleneck)
        self.up = nn.Conv1d(config.bottleneck, dim, 1, groups=config.groups)
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.scale
        self._input_layers = (
            input_layers  # in a tuple, because they are the backbone's modules, not children of the adapter
        )
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            assert zero is not None
            nn.init.zeros_(zero)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        hidden_BNM = self.dropout(self.down(x_BND))
        rows = hidden_BNM.reshape(-1, hidden_BNM.shape[-1], 1)
        out_BND: Tensor = x_BND + self.scale * self.up(rows).reshape(x_BND.shape)
        return out_BND

    @property
    def why_not_mergeable(self) -> str | None:
        """The reason if no layer reads the adapter's output, or one without a bias does."""
        if not self._input_layers:
            return "no linear layer reads exactly what the adapter returns"
        missing_bias = any(getattr(layer, "bias", None) is None for layer in self._input_layers)
        return "a linear layer after it has no bias to fold the adapter's into" if missing_bias else None

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        """Fold W(x + s(U(Dx + b_D) + b_U)) + b into one weight and bias, for every layer that reads x."""
        up: Tensor = torch.block_diag(*self.up.weight[..., 0].chunk(self.up.groups))  # type: ignore[no-untyped-call]
        change = self.scale * (up @ self.down.weight)
        assert self.up.bias is not None
        shift = self.scale * (up @ self.down.bias + self.up.bias)
        for layer in self._input_layers:
            assert isinstance(layer, nn.Linear)
            layer.bias.add_(layer.weight @ shift)
            layer.weight.add_(layer.weight @ change)


class RepAdapter(petune.Tuner[RepAdapterConfig]):
    """Insert a linear bottleneck before attention and MLP of every block.

    RepAdapter (Luo et al., 2023, arXiv 2302.08106, "Towards Efficient Visual Adaption via Structural
    Re-parameterization"):

        x' = x + s · U(D x + b_D) + s · b_U        D dense, U in G groups

    There is no activation, so W x' + b is a linear layer again: the adapter merges into the layers that read x, and
    merged it costs nothing at inference.

    Trains: two adapters per block; three in a decoder's, which has two attentions. Identity at the start: U and both
    biases are zero.
    Parameters: 2·(D·M + M + D·M/G + D) per block. ViT-B/16, M = 8, G = 2: 239,808.

    Differs from the paper: the down-projection is a Linear instead of a 1×1 convolution, which is the same map.
    """

    recipe = petune.Recipe(lr=2e-3, weight_decay=0.0)

    def attach(self, edit: petune.Edit) -> None:
        """Put one adapter before the attention and one before the MLP."""
        for block in edit.sites.require_blocks():
            if block.dim % self.config.groups:
                raise petune.AttachError(
                    f"groups={self.config.groups} does not divide the width {block.dim} of {block.path} of "
                    f"{edit.sites.model}. Use another number of groups"
                )
            for site in block.sublayers:
                input_layers = tuple(layer.module for layer in edit.input_linears(site))
                edit.before(site, LinearAdapter(site.dim, self.config, input_layers))

    def num_parameters(self, sites: petune.Sites) -> int:
        """Return D·M + M + D·M/G + D per attention and MLP."""
        m, g = self.config.bottleneck, self.config.groups
        widths = (site.dim for block in sites.blocks for site in block.branches)
        return sum(d * m + m + d * m // g + d for d in widths)
