"""Vision Transformers as people write them by hand; petune knows none of their names.

Each takes (B, 3, 16, 16) and has 3 classes, width 24, 3 blocks; patch 4, so 16 patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D, HEADS, DEPTH, CLASSES = 24, 4, 3, 3


class Stem(nn.Module):
    """Patches, class token (first, last or none) and positions."""

    def __init__(self, where: str = "front") -> None:
        super().__init__()
        self.size, self.where = 16, where
        self.cut = nn.Conv2d(3, D, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, D)) if where != "none" else None
        self.place = nn.Parameter(torch.randn(1, 16 + (where != "none"), D))

    def forward(self, x: Tensor) -> Tensor:
        x = self.cut(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            token = self.token.expand(len(x), -1, -1)
            x = torch.cat([token, x] if self.where == "front" else [x, token], 1)
        return x + self.place


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, D // HEADS)).transpose(1, 2)


class SplitAttention(nn.Module):
    """Separate q, k and v, a softmax by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads_of(self.q(x)), heads_of(self.k(x)), heads_of(self.v(x))
        weights = (q @ k.mT / (D // HEADS) ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class EinopsAttention(nn.Module):
    """As in vit-pytorch: pre-norm within the attention, fused qkv, a softmax module, einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(D), nn.Softmax(dim=-1)
        self.to_qkv, self.to_out = nn.Linear(D, 3 * D, bias=False), nn.Sequential(nn.Linear(D, D), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(t) for t in self.to_qkv(self.norm(x)).chunk(3, -1))
        weights = self.attend(torch.einsum("bhid,bhjd->bhij", q, k) / (D // HEADS) ** 0.5)
        return self.to_out(torch.einsum("bhij,bhjd->bhid", weights, v).transpose(1, 2).flatten(2))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


def normed_mlp() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Dropout(0.0), nn.Linear(2 * D, D))


class Plus(nn.Module):
    """x + f(x)."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


class Layer(nn.Module):
    """Attention and MLP as modules, with names that no library uses."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.look, self.think = attention, mlp()
        self.n_a, self.n_b = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.look(self.n_a(x))
        return x + self.think(self.n_b(x))


class MhaLayer(nn.Module):
    """nn.MultiheadAttention, whose output is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.mha, self.ff = nn.MultiheadAttention(D, HEADS, batch_first=True), mlp()
        self.pre, self.post = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre(x)
        x = self.mha(y, y, y, need_weights=False)[0] + x
        return self.ff(self.post(x)) + x


class OneModule(nn.Module):
    """Everything in one module: fused attention, no module for attention or MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.one, self.two = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(t) for t in self.qkv(self.one(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.two(x))))


class Pairs(nn.Module):
    """A ModuleList of pairs in a loop, as in vit-pytorch: a block is not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([EinopsAttention(), normed_mlp()]) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed in self.layers:
            x = attention(x) + x
            x = feed(x) + x
        return x


class Transformer(nn.Module):
    """vit-pytorch's: pairs in a loop, and a final norm in the same module."""

    def __init__(self, depth: int, final: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([EinopsAttention(), normed_mlp()]) for _ in range(depth))
        self.final = nn.LayerNorm(D) if final else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed in self.layers:
            x = attention(x) + x
            x = feed(x) + x
        return self.final(x)


class Around(nn.Module):
    """Pairs in a loop, with modules before and after them."""

    def __init__(self, depth: int, after: Sequence[nn.Module], before: nn.Module | None = None) -> None:
        super().__init__()
        self.before, self.after = before or nn.Identity(), nn.Sequential(*after)
        self.layers = nn.ModuleList(nn.ModuleList([EinopsAttention(), normed_mlp()]) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for attention, feed in self.layers:
            x = attention(x) + x
            x = feed(x) + x
        return self.after(x)


class PostNorm(nn.Module):
    """Post-norm blocks in lists of attentions, MLPs and norms, with modules after them."""

    def __init__(self, depth: int, after: Sequence[nn.Module]) -> None:
        super().__init__()
        self.looks = nn.ModuleList(SplitAttention() for _ in range(depth))
        self.thinks = nn.ModuleList(mlp() for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2 * depth))
        self.after = nn.Sequential(*after)

    def forward(self, x: Tensor) -> Tensor:
        for i, (look, think) in enumerate(zip(self.looks, self.thinks, strict=True)):
            x = self.norms[2 * i](x + look(x))
            x = self.norms[2 * i + 1](x + think(x))
        return self.after(x)


class Select(nn.Module):
    """Some tokens, or their mean."""

    def __init__(self, select: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.select = select

    def forward(self, x: Tensor) -> Tensor:
        return self.select(x)


class Nested(nn.Module):
    """A transformer that holds its first block's parts, and the transformer of the blocks after."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.look, self.think = EinopsAttention(), normed_mlp()
        self.rest = Nested(depth - 1) if depth > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.look(x) + x
        x = self.think(x) + x
        return self.rest(x)


class Shared(nn.Module):
    """One block, called several times (as in ALBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Layer(SplitAttention())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(DEPTH):
            x = self.block(x)
        return x


class Vit(nn.Module):
    """Stem, trunk, and a classifier on the class token or on the mean."""

    def __init__(self, trunk: nn.Module, where: str = "front", pool: str = "token") -> None:
        super().__init__()
        self.image_size = 16
        self.stem, self.trunk, self.last = Stem(where), trunk, nn.LayerNorm(D)
        self.where, self.pool, self.to_classes = where, pool, nn.Linear(D, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.last(self.trunk(self.stem(images)))
        x = x.mean(1) if self.pool == "mean" else x[:, -1] if self.where == "behind" else x[:, 0]
        return self.to_classes(x)


def encoder(norm_first: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(D, HEADS, 2 * D, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)


def nested() -> nn.Module:
    """Return Sequentials in Sequentials: residuals are modules, blocks have no class."""
    branch = lambda f: Plus(nn.Sequential(nn.LayerNorm(D), f))  # noqa: E731
    return nn.Sequential(*(nn.Sequential(branch(SplitAttention()), branch(mlp())) for _ in range(DEPTH)))


HANDWRITTEN: dict[str, Callable[[], nn.Module]] = {
    "split q, k, v": lambda: Vit(nn.Sequential(*(Layer(SplitAttention()) for _ in range(DEPTH)))),
    "nested Sequentials": lambda: Vit(nested(), "none", "mean"),
    "einops, pre-norm inside": lambda: Vit(
        nn.Sequential(*(nn.Sequential(Plus(EinopsAttention()), Plus(normed_mlp())) for _ in range(DEPTH)))
    ),
    "nn.MultiheadAttention": lambda: Vit(nn.Sequential(*(MhaLayer() for _ in range(DEPTH)))),
    "nn.TransformerEncoderLayer": lambda: Vit(encoder(norm_first=True)),
    "nn.TransformerEncoderLayer, post-norm": lambda: Vit(encoder(norm_first=False)),
    "all in one module": lambda: Vit(nn.Sequential(*(OneModule() for _ in range(DEPTH)))),
    "ModuleList of pairs": lambda: Vit(Pairs(), pool="mean"),
    "shared weights": lambda: Vit(Shared()),
    "class token at the end": lambda: Vit(nn.Sequential(*(Layer(SplitAttention()) for _ in range(DEPTH))), "behind"),
    "mean pooling": lambda: Vit(nn.Sequential(*(Layer(EinopsAttention()) for _ in range(DEPTH))), "none", "mean"),
}


def build(name: str) -> nn.Module:
    """Return a model of the list, in eval mode, always with the same weights."""
    torch.manual_seed(0)
    return HANDWRITTEN[name]().eval()
