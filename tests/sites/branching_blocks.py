"""Blocks with several attentions or MLPs, attention pooling, and maps with as many rows and columns as channels.

Each model takes (B, 3, 16, 16) and has 3 classes, width 8 and 2 blocks; `Square` has 8×8 patches, the others 4×4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D = 8


class Attention(nn.Module):
    """Attention to its own tokens, or to others."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x: Tensor, others: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (2, -1)).transpose(1, 2)
        k, v = self.kv(x if others is None else others).unflatten(-1, (2, 2, -1)).movedim(2, 0).transpose(2, 3)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


class Block(nn.Module):
    """Layers for all blocks here: norms n, attentions a, MLPs m."""

    def __init__(self, attentions: int = 1, mlps: int = 1, norms: int = 2) -> None:
        super().__init__()
        self.n = nn.ModuleList(nn.LayerNorm(D) for _ in range(norms))
        self.a = nn.ModuleList(Attention() for _ in range(attentions))
        self.m = nn.ModuleList(mlp() for _ in range(mlps))


class Decoder(Block):
    def __init__(self) -> None:
        super().__init__(attentions=2, norms=3)

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        x = x + self.a[0](self.n[0](x))
        x = x + self.a[1](self.n[1](x), others)
        return x + self.m[0](self.n[2](x))


class Macaron(Block):
    def __init__(self) -> None:
        super().__init__(mlps=2, norms=3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.m[0](self.n[0](x))
        x = x + self.a[0](self.n[1](x))
        return x + 0.5 * self.m[1](self.n[2](x))


class TwoMlps(Block):
    def __init__(self) -> None:
        super().__init__(mlps=2, norms=3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a[0](self.n[0](x))
        x = x + self.m[0](self.n[1](x))
        return x + self.m[1](self.n[2](x))


class TwoMlpsPostNorm(TwoMlps):
    def forward(self, x: Tensor) -> Tensor:
        x = self.n[0](x + self.a[0](x))
        x = self.n[1](x + self.m[0](x))
        return self.n[2](x + self.m[1](x))


class MlpFirst(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.m[0](self.n[0](x))
        return x + self.a[0](self.n[1](x))


class BareMatrices(TwoMlps):
    """Two MLPs whose layers the block calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.ModuleList([nn.Linear(D, 2 * D), nn.Linear(2 * D, D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a[0](self.n[0](x))
        x = x + self.m[1](self.m[0](self.n[1](x)).relu())
        return x + self.m[3](self.m[2](self.n[2](x)).relu())


class Twofold(Block):
    """Two attentions, then two MLPs, each with its own norm."""

    def __init__(self) -> None:
        super().__init__(attentions=2, mlps=2, norms=4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a[0](self.n[0](x)) + self.a[1](self.n[1](x))
        return x + self.m[0](self.n[2](x)) + self.m[1](self.n[3](x))


class Axial(Block):
    """One attention is called for rows, then for columns of 4 × 4 tokens; the MLP takes rows."""

    def __init__(self) -> None:
        super().__init__(norms=3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 4, D)
        rows = rows + self.a[0](self.n[0](rows))
        columns = rows.view(-1, 4, 4, D).transpose(1, 2).reshape(-1, 4, D)
        columns = columns + self.a[0](self.n[1](columns))
        return self.finished(columns.view(-1, 4, 4, D).transpose(1, 2).reshape(-1, 4, D)).view(x.shape)

    def finished(self, rows: Tensor) -> Tensor:
        return rows + self.m[0](self.n[2](rows))


class AxialPostNorm(Axial):
    def finished(self, rows: Tensor) -> Tensor:
        return self.n[2](rows + self.m[0](rows))


class AxialScaled(Axial):
    def finished(self, rows: Tensor) -> Tensor:
        return self.n[2](rows + 0.01 * self.m[0](rows))


class AxialColumns(Axial):
    """Returns its tokens in another order."""

    def finished(self, rows: Tensor) -> Tensor:
        return super().finished(rows).view(-1, 4, 4, D).transpose(1, 2).contiguous()


class Parallel(Block):
    """Attention and MLP read the same, as in GPT-J and ViT-22B."""

    def __init__(self) -> None:
        super().__init__(norms=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n[0](x)
        return x + self.a[0](y) + self.m[0](y)


class ParallelNorms(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a[0](self.n[0](x)) + self.m[0](self.n[1](x))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = nn.LayerNorm(D), Attention(), nn.LayerNorm(D), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ChannelsSecond(Plain):
    """Takes and returns a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(2).mT).mT.reshape(x.shape)


class ChannelsLast(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).view(x.shape)


class Vit(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.image_size, self.stem = 16, nn.Conv2d(3, D, 4, 4)
        self.blocks = nn.ModuleList(make() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Queries(Vit):
    """Learned queries attend to the patches."""

    def __init__(self) -> None:
        super().__init__(Decoder)
        self.queries = nn.Parameter(torch.randn(1, 5, D))

    def forward(self, x: Tensor) -> Tensor:
        patches, x = self.stem(x).flatten(2).mT, self.queries.expand(len(x), -1, -1)
        for block in self.blocks:
            x = block(x, patches)
        return self.head(self.norm(x).mean(1))


class Pooled(Vit):
    """Learned queries pool the tokens, without a residual connection."""

    def __init__(self) -> None:
        super().__init__(Plain)
        self.queries, self.pool = nn.Parameter(torch.randn(1, 3, D)), nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(self.pool(self.queries.expand(len(x), -1, -1), x, x)[0][:, 0])


class Square(Vit):
    def __init__(self, make: Callable[[], nn.Module], axis: int) -> None:
        super().__init__(make)
        self.stem, self.axis = nn.Conv2d(3, D, 2, 2), axis

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).movedim(1, self.axis)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.movedim(self.axis, -1)).mean((1, 2)))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "decoder": Queries,
    "macaron": lambda: Vit(Macaron),
    "twofold": lambda: Vit(Twofold),
    "two MLPs": lambda: Vit(TwoMlps),
    "post-norm MLPs": lambda: Vit(TwoMlpsPostNorm),
    "MLP first": lambda: Vit(MlpFirst),
    "bare matrices": lambda: Vit(BareMatrices),
    "axial": lambda: Vit(Axial),
    "post-norm axial": lambda: Vit(AxialPostNorm),
    "parallel": lambda: Vit(Parallel),
    "parallel norms": lambda: Vit(ParallelNorms),
    "pooled": Pooled,
    "square, channels second": lambda: Square(ChannelsSecond, 1),
    "square, channels last": lambda: Square(ChannelsLast, -1),
}


def build(name: str) -> nn.Module:
    """Return a model of the list, in eval mode, always with the same weights."""
    torch.manual_seed(0)
    return BLOCKS[name]().eval()
