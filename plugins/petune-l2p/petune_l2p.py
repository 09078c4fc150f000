"""L2P: choose prompts from a pool by a first pass through the frozen model.

Legend: B batch, N tokens, D width, P prompts in the pool, K chosen ones, L tokens of a prompt.
"""

from collections.abc import Callable

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize

import petune


class L2PConfig(petune.TunerConfig):
    """Options of L2P.

    Attributes:
        pool_size: P; the paper's 10.
        top_k: K, the prompts that an image chooses; the paper's 5.
        length: L; the paper's 5.
        pull: λ, the weight of the loss that pulls keys towards the images that choose them; the authors' 0.1.
    """

    pool_size: int = Field(10, ge=1)
    top_k: int = Field(5, ge=1)
    length: int = Field(5, ge=1)
    pull: float = Field(0.1, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "L2PConfig":
        if self.top_k > self.pool_size:
            raise ValueError(f"top_k={self.top_k} prompts cannot be chosen from a pool of {self.pool_size}")
        return self


class Pool(nn.Module):
    """Prompts with keys; it runs the model twice, first to choose them, then with them."""

    why_not_mergeable = "prompts are tokens, not a change of weights"
    aux_loss: Tensor | None = None

    def __init__(self, dim: int, num_prefix_tokens: int, config: L2PConfig) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.top_k, self.pull = config.top_k, config.pull
        self.prompts = nn.Parameter(torch.empty(config.pool_size, config.length, dim).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(config.pool_size, dim).uniform_(-1, 1))

    def forward(self, inner: Callable[[Tensor], Tensor], x_BND: Tensor) -> Tensor:
        """Map (B, N, D) to the same shape: every token is the mean of the prompts' outputs, which the head reads."""
        with torch.no_grad():
            features_BND = inner(x_BND)
        query_BD = features_BND[:, 0] if self.num_prefix_tokens else features_BND.mean(1)
        similarity_BP = normalize(query_BD, dim=-1) @ normalize(self.keys, dim=-1).T
        nearest_BK, chosen_BK = similarity_BP.topk(self.top_k, dim=-1)
        self.aux_loss = -self.pull * nearest_BK.sum(-1).mean()
        prompts_BTD = self.prompts[chosen_BK].flatten(1, 2).to(x_BND.dtype)
        prefix, patches = x_BND.tensor_split([self.num_prefix_tokens], dim=1)
        y_BND = inner(torch.cat([prefix, prompts_BTD, patches], dim=1))
        start, count = self.num_prefix_tokens, prompts_BTD.shape[1]
        return y_BND[:, start : start + count].mean(1, keepdim=True).expand_as(x_BND)


class L2P(petune.Tuner[L2PConfig]):
    """Let each image choose prompts from a pool by a first pass through the frozen model.

    Learning to prompt (Wang et al., CVPR 2022, arXiv 2112.08654), for tasks that come one after another, with f the
    blocks and the final norm, and x the tokens of an image:

        q = f(x)[class token]                              without a gradient
        I = the K keys k_i with the largest cos(q, k_i)
        z = mean over the prompts' tokens of f([class token; P_I; patches])
        L = L_task(head(z)) - λ · sum over I of cos(q, k_i)

    Trains: prompts and keys. Not the identity at the start. Needs blocks that all see the same tokens and a final norm
    right behind them. examples/class_incremental.py has the paper's protocol.
    Parameters: P·(L + 1)·D. ViT-B/16, P = 10, L = 5: 46,080.

    Differs from the paper: prompts have no position embedding, which the authors' code adds to them. Each image chooses
    its own prompts, as in the paper's equation; the code takes those that most images of a batch choose.
    """

    recipe = petune.Recipe(lr=3e-2, weight_decay=0.0, optimizer="adam")
    identity_at_init = False

    def attach(self, edit: petune.Edit) -> None:
        """Put the pool around all blocks and the final norm."""
        blocks = edit.sites.require_blocks()
        if len(blocks) < len(edit.sites.all_blocks):
            raise petune.AttachError("L2P runs all blocks, from the first to the last. Leave out the option blocks")
        if len({block.dim for block in blocks}) > 1 or any(block.layout != "BNC" for block in blocks):
            raise petune.AttachError(
                f"L2P needs blocks that all see one row of tokens, which those of {edit.sites.model} do not. Use vpt"
            )
        pool = Pool(blocks[0].dim, edit.sites.num_prefix_tokens, self.config)
        edit.around([*blocks, edit.sites.norm], pool)

    def num_parameters(self, sites: petune.Sites) -> int:
        """Return P·(L + 1)·D."""
        return self.config.pool_size * (self.config.length + 1) * sites.embed_dim
