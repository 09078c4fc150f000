"""SSF (Lian et al., NeurIPS 2022, arXiv 2210.08823): scale and shift what leaves every linear layer and norm.

y' = γ · y + β        γ ~ N(1, 0.02²), β ~ N(0, 0.02²) at the start
"""

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class SSFConfig(petune.TunerConfig):
    """Options of SSF: `init_std` is the spread of γ and β at the start."""

    init_std: float = Field(0.02, ge=0)


class ScaleShift(nn.Module):
    """γ · y + β, which folds into the layer before it."""

    def __init__(self, dim: int, std: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim).normal_(1, std))
        self.shift = nn.Parameter(torch.empty(dim).normal_(0, std))

    def forward(self, y: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        return y * self.scale + self.shift

    @torch.no_grad()
    def merge(self, layer: nn.Module) -> None:
        """γ · (W x + b) + β is a linear layer again, and a norm's g · x̂ + b is a norm."""
        if getattr(layer, "bias", None) is None:
            raise petune.NotMergeable("SSF's shift needs a layer with a bias to go into")
        layer.weight.mul_(self.scale if layer.weight.ndim == 1 else self.scale[:, None])
        layer.bias.mul_(self.scale).add_(self.shift)


class SSF(petune.Tuner[SSFConfig]):
    """SSF. Parameters: 22·D a block with an MLP of 4·D, 2·D for the final norm. ViT-B/16: 204,288.

    Differs from the paper: nothing behind the patch embedding (2·D more there).
    """

    recipe = petune.Recipe(lr=5e-3, weight_decay=0.0)
    identity_at_init = False

    def attach(self, edit: petune.Edit) -> None:
        """One γ and β behind every linear layer and every norm."""
        for block in edit.sites.require_blocks():
            for layer in (*edit.linear_layers(block.attn), *edit.linear_layers(block.mlp)):
                edit.after(layer, ScaleShift(layer.module.out_features, self.config.init_std))
            for norm in (block.parts.get("norm1"), block.parts.get("norm2")):
                if norm is not None:
                    edit.after(norm, ScaleShift(norm.dim, self.config.init_std))
        if "norm" in edit.sites.parts:
            edit.after(edit.sites.norm, ScaleShift(edit.sites.norm.dim, self.config.init_std))
