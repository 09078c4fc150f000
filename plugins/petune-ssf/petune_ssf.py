"""SSF: scale and shift the output of every linear layer and norm."""

import re
import warnings

import torch
from pydantic import Field
from torch import Tensor, nn

import petune

NUMBER = r"(?<=[._])\d+(?=\.)"


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

    Left as they are, with a warning that names them: linear layers that the model reads without calling them
    (`out_proj` of torch's `nn.MultiheadAttention`, and its fused q, k and v), convolutions, norms other than those
    before attention and MLP, such as norms of queries and keys, after a branch, or between an encoder and its decoder,
    weights that a block gives to a product or norm itself, layers of other kinds, and layers after the blocks, such as
    attention that pools. Left without one: what comes before the first block (CLIP's norm), embeddings, tokens, tables
    of positions, factors of channels (LayerScale), and what changes the tokens' number or width between two stages.
    """

    recipe = petune.Recipe(lr=5e-3, weight_decay=0.0)
    identity_at_init = False

    def attach(self, edit: petune.Edit) -> None:
        """Put one γ and β after every linear layer and every norm."""
        blocks = edit.sites.require_blocks()
        scaled = {f"{mlp.path}." for block in blocks for mlp in block.split_mlps}  # petune names these
        for block in blocks:
            for site in block.sublayers:
                for layer in edit.linear_layers(site, transposed=True):
                    width = layer.module.weight.shape[0 if isinstance(layer.module, nn.Linear) else 1]
                    edit.after(layer, ScaleShift(width, self.config.init_std))
                    scaled.add(f"{layer.path}.")
            for norm in block.norms:
                edit.after(norm, ScaleShift(norm.dim, self.config.init_std))
                scaled.add(f"{norm.path}.")
        for final in dict.fromkeys(norm for tower in edit.sites.towers for norm in tower.norms):
            edit.after(final, ScaleShift(final.dim, self.config.init_std))
        chosen, every = {block.index for block in blocks}, edit.sites.layers
        layers = [path for path, i in {**every.in_blocks, **every.outside}.items() if i in chosen]
        if left_out := [path for path in layers if not f"{path}.".startswith(tuple(scaled))]:
            names = ", ".join(dict.fromkeys(re.sub(NUMBER, "*", path) for path in left_out))
            warnings.warn(f"ssf leaves {len(left_out)} of {len(layers)} layers as they are: {names}", stacklevel=2)
