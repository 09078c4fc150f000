"""FacT: one factored change of the weights of all blocks.

Legend: D width, R rank (also S and T), I and O chunks of D inputs and outputs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class FacTConfig(petune.TunerConfig):
    """Options of FacT.

    Attributes:
        form: `tt` is the tensor train, FacT-TT; `tk` is Tucker's form, FacT-TK, whose cores are mixed from one.
        rank: r; the paper's 16.
        scale: s; the paper searches 0.01 to 100 on each dataset, and 1 is the middle of that.
        dropout: Dropout on the hidden units; the authors' 0.1.
    """

    form: Literal["tt", "tk"] = "tt"
    rank: int = Field(16, ge=1)
    scale: float = Field(1.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)


@dataclass(frozen=True)
class SharedFactors:
    """Factors that all layers of one width share.

    Attributes:
        u_DR, v_DR: U and V.
        core_TRS: The core of Tucker's form; None in a tensor train.
    """

    u_DR: nn.Parameter
    v_DR: nn.Parameter
    core_TRS: nn.Parameter | None


class Factors(nn.Module):
    """The change of one linear layer; U, V and C are the same parameters in every layer of that width."""

    def __init__(self, shared: SharedFactors, shape: tuple[int, int], config: FacTConfig) -> None:
        super().__init__()
        self.u = shared.u_DR
        self.v = shared.v_DR
        self.shared_core = shared.core_TRS
        self.shape = shape
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.scale
        if shared.core_TRS is None:
            self.core = nn.Parameter(torch.empty(*shape, config.rank, config.rank))
            nn.init.normal_(self.core, std=config.rank**-0.5)
        else:
            self.p = nn.Parameter(torch.empty(*shape, config.rank))
            nn.init.normal_(self.p, std=config.rank**-0.5)

    def cores(self) -> Tensor:
        """Return Σ of each D×D matrix, (I, O, R, S)."""
        if self.shared_core is None:
            return self.core
        return torch.einsum("iot,trs->iors", self.p, self.shared_core)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I·D) to (..., O·D)."""
        x_ID = x.reshape(*x.shape[:-1], self.shape[0], x.shape[-1] // self.shape[0])  # -1 fails without tokens
        hidden = torch.einsum("...id,dr,iors->...os", x_ID, self.u, self.cores())
        return cast(Tensor, self.scale * (self.dropout(hidden) @ self.v.T).flatten(-2))

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        """Add the change to the layer's weight, (O·D, I·D); transformers' Conv1D holds (I·D, O·D)."""
        is_transposed = not isinstance(module, nn.Linear)
        change = torch.einsum(f"dr,iors,es->{'idoe' if is_transposed else 'oeid'}", self.u, self.cores(), self.v)
        weight = cast(Tensor, module.weight)
        weight += self.scale * change.reshape(weight.shape)


class FacT(petune.Tuner[FacTConfig]):
    """Change the weights of all blocks by one tensor in factored form (FacT-TT or FacT-TK).

    Factor-Tuning (Jie & Deng, AAAI 2023, arXiv 2212.03145), as a tensor train (`form=tt`), or in Tucker's form
    (`form=tk`):

        FacT-TT:  ΔW_i = s · U Σ_i Vᵀ               U and V (D×r) are shared by the whole model
        FacT-TK:  ΔW_i = s · U (Σ_t P_it C_t) Vᵀ    U, V and C (r×r×r) are shared by the whole model

    Here i counts the D×D matrices of the model. A layer of a·D inputs and b·D outputs is a·b of them: qkv 3, proj 1,
    each layer of the MLP 4. Its own are Σ_i (r×r), and in Tucker's form the row P_i (r).

    Trains: shared factors, and a small core per matrix. Shared are U and V, and in Tucker's form the core C too;
    a matrix's own is Σ, in Tucker's form a row of P. The matrices are those of the layers of attention and MLP whose
    sides are multiples of the width. Identity at the start: V is zero.
    Parameters: 2·D·r for each width, and 12·r² per block with an MLP of 4·D. ViT-B/16, r = 16: 61,440. FacT-TK: 2·D·r +
    r³ for each width, and 12·r per block. ViT-B/16, r = 16: 30,976.

    Differs from the paper: a model whose stages change the width has shared factors for each width. V starts at zero as
    in the paper, U by Xavier, and the cores by N(0, 1/r), where the authors' code has nn.Linear's default; in Tucker's
    form C and P by N(0, 1/r), so that the mixed cores start as those of the tensor train. The authors' code of FacT-TK
    reshapes the MLP's mixed cores so that t and the column of C_t interleave; here they are the formula's.
    """

    recipe = petune.Recipe(lr=1e-3, weight_decay=1e-4)

    def attach(self, edit: petune.Edit) -> None:
        """Put one core at every linear layer of attention and MLP whose sides are multiples of the width."""
        shared: dict[int, SharedFactors] = {}
        num_changed = 0
        skipped: list[str] = []
        for block in edit.sites.require_blocks():
            width = block.dim
            if width not in shared:
                shared[width] = self._shared(width)
            for layer in _linear_layers(edit, block):
                out_dim, in_dim = _sides(layer.module)
                if in_dim % width == 0 and out_dim % width == 0:
                    shape = (in_dim // width, out_dim // width)
                    edit.parallel(layer, layer, Factors(shared[width], shape, self.config))
                    num_changed += 1
                else:
                    skipped.append(layer.path)
        _report(edit.sites.model, num_changed, skipped)

    def _shared(self, width: int) -> SharedFactors:
        rank = self.config.rank
        u_DR = nn.Parameter(torch.empty(width, rank))
        v_DR = nn.Parameter(torch.zeros(width, rank))
        nn.init.xavier_uniform_(u_DR)
        if self.config.form == "tt":
            return SharedFactors(u_DR, v_DR, None)
        core_TRS = nn.Parameter(torch.empty(rank, rank, rank))
        nn.init.normal_(core_TRS, std=rank**-0.5)
        return SharedFactors(u_DR, v_DR, core_TRS)


def _sides(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of outputs and inputs; transformers' Conv1D holds its weight as (inputs, outputs)."""
    weight = cast(Tensor, layer.weight)
    out_dim, in_dim = weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1]
    return out_dim, in_dim


def _linear_layers(edit: petune.Edit, block: petune.Block) -> list[petune.Site]:
    """Return the linear layers of attentions and MLPs."""
    return [layer for site in block.branches or [block] for layer in edit.linear_layers(site, transposed=True)]


def _report(model: str, num_changed: int, skipped: list[str]) -> None:
    """Refuse a model in which no layer fits; warn if some do not."""
    names = ", ".join(skipped[:3])
    if not num_changed:
        raise petune.AttachError(
            f"fact needs linear layers whose sides are multiples of the block's width, but {model} has none"
            f"{f' (not {names})' if skipped else ''}. Use lora, or adaptformer"
        )
    if skipped:
        warnings.warn(
            f"fact leaves out {len(skipped)} of {len(skipped) + num_changed} linear layers of {model}, because their "
            f"sides are no multiples of the width: {names}",
            stacklevel=3,
        )
