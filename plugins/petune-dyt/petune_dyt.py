"""DyT: each token decides in every block whether it needs the MLP.

Legend: B batch, N tokens, D width, M bottleneck, K tokens that were chosen.
"""

import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

import petune


class DyTConfig(petune.TunerConfig):
    """Options of DyT.

    Attributes:
        rate: r, the share of tokens that should pass the MLPs; the paper's 0.5.
        rate_weight: Weight of the loss that keeps the share; the authors' 2.
        temperature: τ of the gate's noise in training; the authors' 5.
        bottleneck: M of the adapters; the authors' 64.
        scale: s of the adapters; the authors' 0.1.
        dropout: Dropout of the adapters; the authors' 0.1.
    """

    rate: float = Field(0.5, gt=0, le=1)
    rate_weight: float = Field(2.0, ge=0)
    temperature: float = Field(5.0, gt=0)
    bottleneck: int = Field(64, ge=1)
    scale: float = Field(0.1, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)


class Dispatch(nn.Module):
    """Gives the tokens that a gate chooses to the norm and the MLP, and zero to the others."""

    why_not_mergeable = "it leaves out tokens"
    aux_loss: Tensor | None = None

    def __init__(self, dim: int, num_prefix_tokens: int, temperature: float) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.temperature = temperature
        self.gate = nn.Linear(dim, 1)

    def forward(self, inner: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Map (..., D) to the same shape. Prefix tokens are always chosen."""
        x_BND = x.flatten(1, -2)
        patches = self.choose(x_BND[:, self.num_prefix_tokens :])
        self.aux_loss = patches.mean()
        prefix = patches.new_ones(len(x), min(self.num_prefix_tokens, x_BND.shape[1]), 1)
        chosen_BN1 = torch.cat([prefix, patches], dim=1)
        # in training the gate of a token left out has a gradient, too; a traced shape must not depend on values
        if self.training or x.is_meta or torch.compiler.is_compiling():
            return (chosen_BN1 * inner(x).reshape(x_BND.shape)).reshape(x.shape)
        rows = chosen_BN1[..., 0] > 0
        y_1KD = inner(x_BND[rows].unsqueeze(0))
        return torch.zeros_like(x_BND).masked_scatter(rows.unsqueeze(-1), y_1KD.to(x.dtype)).reshape(x.shape)

    def choose(self, x_BND: Tensor) -> Tensor:
        """Return (B, N, 1) of 0 and 1; in training with noise, and the gradient of a sigmoid."""
        logits_BN1 = self.gate(x_BND)
        if not self.training:
            return (logits_BN1 > 0).to(x_BND.dtype)
        noise = -torch.empty(2, *logits_BN1.shape, device=x_BND.device, dtype=torch.float32).exponential_().log()
        soft_BN1 = ((logits_BN1 + (noise[0] - noise[1]).to(logits_BN1.dtype)) / self.temperature).sigmoid()
        return (soft_BN1 > 0.5).to(soft_BN1.dtype) - soft_BN1.detach() + soft_BN1


class Bottleneck(nn.Module):
    """s · (dropout(ReLU(down(x))) up), zero at the start."""

    why_not_mergeable = "its ReLU is not linear"

    def __init__(self, dim: int, config: DyTConfig) -> None:
        super().__init__()
        self.scale = config.scale
        self.down = nn.Linear(dim, config.bottleneck)
        self.up = nn.Linear(config.bottleneck, dim)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Map (..., D) to the same shape."""
        return self.scale * self.up(self.dropout(torch.relu(self.down(x_BND))))


class DyT(petune.Tuner[DyTConfig]):
    """Let each token skip the MLP of a block, and give all tokens a bottleneck MLP beside it.

    Dynamic Tuning (Zhao et al., NeurIPS 2024, arXiv 2403.11808), its MLP dispatch, with the residual stream x after the
    attention and a gate for every patch:

        m = 1 where sigmoid(x w + b) > 0.5, else 0
        x = x + m · mlp(norm2(x)) + s · adapter(x)
        L = L_task + 2 · (mean of m over tokens and blocks - r)²

    In training the gate has Gumbel noise and the temperature τ, and the gradient of its sigmoid. In evaluation norm and
    MLP run on the chosen tokens alone: with r = 0.5 they do half of their work.

    Trains: a gate and an adapter per block. Not the identity at the start: the gates are random.
    Parameters: 2·D·M + M + 2·D + 1 per block. ViT-B/16, M = 64: 1,198,860.

    Differs from the paper: there is no second forward of the complete model in training, from which the authors distill
    (its loss and the divergence from it). The mixture of adapters of its appendix is left out.
    """

    recipe = petune.Recipe(lr=1e-3, weight_decay=0.0)
    identity_at_init = False

    def attach(self, edit: petune.Edit) -> None:
        """Put a gate around norm and MLP of every block, and an adapter beside them."""
        config = self.config
        for block in edit.sites.require_blocks():
            gate = Dispatch(block.mid.dim, edit.sites.num_prefix_tokens, config.temperature)
            edit.around([block.norm2, block.mlp] if block.norm_first else block.mlp, gate)
            if block.changes_sum and block.scales_mlp:
                raise petune.AttachError(
                    f"block {block.index} ({block.where}) of {block.model} multiplies its MLP's output by numbers "
                    "before it adds it, and an adapter that adds to that output would be multiplied, too. Use lora"
                )
            exit = block.mlp if block.changes_sum else block
            edit.parallel(block.mid, exit, Bottleneck(block.mid.dim, config))

    def aux_loss(self, values: list[Tensor]) -> Tensor:
        """Return the square of how far the share of all blocks is from r, weighted."""
        return self.config.rate_weight * (torch.stack(values).mean() - self.config.rate) ** 2

    def num_parameters(self, sites: petune.Sites) -> int:
        """Return 2·D·M + M + 2·D + 1 per block."""
        m = self.config.bottleneck
        return sum(2 * block.dim * m + m + 2 * block.dim + 1 for block in sites.blocks)
