"""Small Transformers that take more than one image: videos, volumes, several tensors, dicts, packed patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

D = 16


class Layer(nn.Module):
    """A pre-norm block over (B, N, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.MultiheadAttention(D, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Two blocks, a norm, the mean of the tokens that count, and a classifier of 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Layer(), Layer()])
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def classify(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if valid is None:
            return self.head(x.mean(1))
        weights = valid.to(x.dtype)[..., None]
        return self.head((x * weights).sum(1) / weights.sum(1))


class Volumes(Encoder):
    """Take (B, 2, depth, height, width), as videos with channels first do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(2, D, (2, 4, 4), (2, 4, 4))
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, 13, D))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.classify(torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1) + self.pos)


class Clips(Encoder):
    """Take (B, frames, 3, 8, 8); frames are folded into the batch and averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, D, 4, 4)

    def forward(self, clips: Tensor) -> Tensor:
        tokens = self.embed(clips.flatten(0, 1)).flatten(2).transpose(1, 2)
        return self.classify(tokens).unflatten(0, clips.shape[:2]).mean(1)


class FoldedClips(Clips):
    """Take (B · 4 frames, 3, 8, 8): one clip is four rows of the batch."""

    def forward(self, frames: Tensor) -> Tensor:
        return super().forward(frames.unflatten(0, (-1, 4)))


class Patches(Encoder):
    """Take a dict, as timm's NaFlexViT does: patches, where they are, and which of them count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rows, self.columns = nn.Linear(12, D), nn.Embedding(4, D), nn.Embedding(4, D)

    def forward(self, x: Mapping[str, Tensor] | Tensor, scale: float = 1.0) -> Tensor:
        if isinstance(x, Tensor):
            raise TypeError("a dict of patches is needed")
        where = self.rows(x["patch_coord"][..., 0]) + self.columns(x["patch_coord"][..., 1])
        return self.classify(self.embed(x["patches"]) * scale + where, x["patch_valid"])


class TwoTowers(Encoder):
    """Take an image and text as named arguments, one of them nested."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.words = nn.Conv2d(1, D, 4, 4), nn.Embedding(9, D)

    def forward(self, *, pixels: Tensor, text: Mapping[str, Any], return_dict: bool = False) -> Any:
        words = self.words(text["ids"]) * text["mask"][..., None]
        logits = self.classify(torch.cat([words, self.embed(pixels).flatten(2).transpose(1, 2)], 1))
        return {"logits": logits} if return_dict else (logits,)


class Masked(Encoder):
    """Take (patches, sizes): all samples share a mask of their tokens; the batch is the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pos = nn.Linear(6, D), nn.Parameter(torch.randn(5, 1, D))

    def forward(self, patches: Tensor, mask: Tensor) -> Tensor:
        x = (self.embed(patches) + self.pos).transpose(0, 1)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x).mean(1))


class Packed(Encoder):
    """Take the patches of all images in one row, and how many each image has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, D)

    def forward(self, patches: Tensor, counts: Tensor) -> Tensor:
        assert int(counts.sum()) == len(patches)
        parts = torch.split(self.embed(patches), counts.tolist())
        return self.classify(torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True))


def patches() -> dict[str, Tensor]:
    coord = torch.cartesian_prod(torch.arange(2), torch.arange(3)).expand(2, -1, -1)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    return {"patches": torch.randn(2, 6, 12), "patch_coord": coord, "patch_valid": valid}


def towers() -> dict[str, Any]:
    text = {"ids": torch.tensor([[1, 8, 0]]), "mask": torch.tensor([[1.0, 1.0, 0.0]])}
    return {"pixels": torch.zeros(1, 1, 8, 12), "text": text, "return_dict": True}


EXAMPLES: dict[type[nn.Module], Callable[[], Any]] = {
    Volumes: lambda: torch.zeros(1, 2, 4, 8, 12),
    Clips: lambda: torch.zeros(2, 3, 3, 8, 8),
    FoldedClips: lambda: torch.zeros(4, 3, 8, 8),
    Patches: patches,
    TwoTowers: towers,
    Masked: lambda: (torch.zeros(5, 2, 6), torch.tril(torch.ones(5, 5)).log()),
    Packed: lambda: ((torch.zeros(7, 6),), {"counts": torch.tensor([7])}),
}
