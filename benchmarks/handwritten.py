"""A ViT with AdaptFormer written by hand, with adapters in the forward of its blocks, to compare injection with.

Modules have the names of timm's ViT, so that its weights load; the adapters are `blocks.I.adapter`.

Legend: B batch, N tokens, D width, H heads, E width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Adapter(nn.Module):
    """s · (dropout(ReLU(x W_down + b_down)) W_up + b_up)."""

    def __init__(self, dim: int, bottleneck: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.up(self.dropout(torch.relu(self.down(x_BND)))) * self.scale


class Attention(nn.Module):
    """Self-attention; with `fused`, by the kernel that timm uses."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused = True
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        B, N, D = x_BND.shape
        q_BHNE, k_BHNE, v_BHNE = (
            self.qkv(x_BND).reshape(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        if self.fused:
            y_BHNE = F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE)
        else:
            attn = (q_BHNE * (D // self.num_heads) ** -0.5) @ k_BHNE.transpose(-2, -1)
            y_BHNE = attn.softmax(dim=-1) @ v_BHNE
        return self.proj(y_BHNE.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND)))


class Block(nn.Module):
    """A pre-norm block with an adapter that reads the residual stream, in parallel to the MLP."""

    def __init__(self, dim: int, num_heads: int, bottleneck: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.adapter = Adapter(dim, bottleneck, scale, dropout)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND)) + self.adapter(x_BND)


class PatchEmbed(nn.Module):
    """From patches to tokens."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


class AdaptFormerViT(nn.Module):
    """A ViT that classifies its class token; only adapters and head train."""

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        bottleneck: int = 64,
        scale: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (img_size // patch_size) ** 2 + 1, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, bottleneck, scale, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        for key, p in self.named_parameters():
            p.requires_grad = ".adapter." in key or key.startswith("head.")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BND = self.patch_embed(x_BCHW)
        x_BND = torch.cat([self.cls_token.expand(len(x_BND), -1, -1), x_BND], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x_BND))[:, 0])

    def copy_from(self, model: nn.Module) -> AdaptFormerViT:
        """Copy the weights of a timm ViT with petune's AdaptFormer attached, and return this model."""
        state = {k.replace(".petune_adaptformer.adapter.", ".adapter."): v for k, v in model.state_dict().items()}
        self.load_state_dict(state)
        return self
