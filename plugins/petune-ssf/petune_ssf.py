"""SSF: scale and shift the output of every linear layer and norm."""

import warnings

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class SSFConfig(petune.TunerConfig):
    """Options of SSF.

    Attributes:
        init_std: Standard deviation of γ and β at the start; the authors' 0.02.
    """

    init_std: float = Field(0.02, ge=0)


class ScaleShift(nn.Module):
    """γ · y + β, which merges into the layer before it."""

    def __init__(self, dim: int, std: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim).normal_(1, std))
        self.shift = nn.Parameter(torch.empty(dim).normal_(0, std))

    def forward(self, y: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        return y * self.scale + self.shift

    @torch.no_grad()
    def merge(self, layer: nn.Module) -> None:
        """Fold into a linear layer's W x + b, or a norm's g · x̂ + b."""
        if getattr(layer, "bias", None) is None:
            raise petune.NotMergeable("SSF's shift needs a layer with a bias to merge into")
        rows = isinstance(layer, nn.Linear)  # of the outputs; transformers' Conv1D has columns
        layer.weight.mul_(self.scale[:, None] if rows else self.scale)
        layer.bias.mul_(self.scale).add_(self.shift)


class SSF(petune.Tuner[SSFConfig]):
    """Scale and shift the output of every linear layer and norm.

    SSF (Lian et al., NeurIPS 2022, arXiv 2210.08823):

        y' = γ · y + β        γ ~ N(1, 0.02²), β ~ N(0, 0.02²) at the start

    Trains: γ and β per output channel. Not the identity at the start.
    Parameters: 22·D per block with an MLP of 4·D, 2·D for the final norm. ViT-B/16: 204,288.

    Differs from the paper: the patch embedding is not scaled (2·D more there). The authors' code also scales inside
    Swin's PatchMerging, between the stages; γ and β after its norm and its linear layer would be 12·D more for each
    (Swin-T: 8,064). Where a model averages its tokens before the last norm (timm's `fc_norm`), they scale before the
    average, and here the norm's output is scaled, after it: 2·D either way. Where several norms are between blocks and
    heads, such as two in a row or one after each block, γ and β follow each.

    Left as they are, with a warning: linear layers that the model reads without calling them (`out_proj` of torch's
    `nn.MultiheadAttention`, and its fused q, k and v), convolutions, and norms other than those before attention and
    MLP, such as norms of queries and keys, or after a branch. Left without one: norms before the first block (CLIP's).
    """

    recipe = petune.Recipe(lr=5e-3, weight_decay=0.0)
    identity_at_init = False

    def attach(self, edit: petune.Edit) -> None:
        """Put one γ and β after every linear layer and every norm."""
        blocks, scaled = edit.sites.require_blocks(), set()
        for block in blocks:
            for site in block.sublayers:
                for layer in edit.linear_layers(site, transposed=True):
                    width = layer.module.weight.shape[0 if isinstance(layer.module, nn.Linear) else 1]
                    edit.after(layer, ScaleShift(width, self.config.init_std))
                    scaled.add(layer.module)
            for norm in block.norms:
                edit.after(norm, ScaleShift(norm.dim, self.config.init_std))
                scaled.add(norm.module)
        for final in dict.fromkeys(norm for tower in edit.sites.towers for norm in tower.norms):
            edit.after(final, ScaleShift(final.dim, self.config.init_std))
        inside = {m for block in blocks for own in block.own_modules for m in own.modules()}
        weighted = [m for m in edit.backbone() if m in inside and getattr(m, "weight", None) is not None]
        covered = {m for layer in scaled for m in layer.modules()}  # a layer may be wrapped by another adapter
        if left_out := [edit.site(m).path for m in weighted if covered.isdisjoint(m.modules())]:
            warnings.warn(
                f"ssf leaves {len(left_out)} of {len(weighted)} layers as they are: {left_out[0]}, …", stacklevel=2
            )
