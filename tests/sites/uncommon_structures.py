"""Vision Transformers whose structure differs from the usual: several branches, other streams, other norms and weights.

Each takes (B, 3, 16, 16) and has 3 classes, width 24, 2 blocks; 16 patches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

D, HEADS, CLASSES = 24, 4, 3


class Attention(nn.Module):
    """Pre-norm inside; the weights go through a Sequential of softmax and dropout."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D) if norm else nn.Identity()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.attend = nn.Sequential(nn.Softmax(-1), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        windows = self.norm(x).flatten(-3, -2) if x.ndim == 6 else self.norm(x)
        q, k, v = self.qkv(windows).unflatten(-1, (3, HEADS, D // HEADS)).movedim(-3, 0).transpose(-3, -2)
        return self.out((self.attend(q @ k.mT) @ v).transpose(-3, -2).flatten(-2)).view(x.shape)


def mlp(norm: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(D) if norm else nn.Identity(), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)
    )


class Pairs(nn.Module):
    """A loop over (attention, MLP), to be overridden."""

    def __init__(self, attention: Callable[[], nn.Module] = Attention, feed: Callable[[], nn.Module] = mlp) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([attention(), feed()]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed in self.layers:
            x = attention(x) + x
            x = feed(x) + x
        return x


class Vit(nn.Module):
    def __init__(self, trunk: nn.Module, *, as_image: bool = False, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.image_size, self.as_image = 16, as_image
        self.stem, self.trunk = nn.Conv2d(3, D, 4, 4), trunk
        self.last, self.head = norm or nn.LayerNorm(D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.trunk(x).flatten(2).mT if self.as_image else self.trunk(x.flatten(2).mT)
        return self.head(self.last(x).mean(1))


class Summed(nn.Module):
    """Several branches that read the same tokens."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([make(), make()])

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)


class Lanes(Pairs):
    """Hyper-connections: the branches read a mix of the streams, which are mixed themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(4, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        lanes, mixes = torch.stack([x, x]), iter(self.mix)
        for layer in self.layers:
            for branch in layer:
                mixed = torch.einsum("ml,lbnd->mbnd", next(mixes), lanes)
                lanes = mixed[1:] + branch(mixed[0]) / 2
        return lanes.sum(0)


class UnitRows(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.normalize(weight, dim=-1)


def normalized(module: nn.Module) -> nn.Module:
    """Give every linear layer a weight of unit rows."""
    for layer in [m for m in module.modules() if isinstance(m, nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", UnitRows())
    return module


class Sphere(Pairs):
    """nViT: normalized weights, and tokens that move on the unit sphere by a learned step."""

    def __init__(self) -> None:
        super().__init__(lambda: normalized(Attention(norm=False)), lambda: normalized(mlp(norm=False)))
        self.step = nn.Parameter(torch.full((D,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for branch in layer:
                x = F.normalize(x.lerp(F.normalize(branch(x), dim=-1), self.step), dim=-1)
        return x


class Scaled(Pairs):
    """Post-norm of a stream that is scaled by a number, as in Keel and DeepNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        norms = iter(self.norms)
        for layer in self.layers:
            for branch in layer:
                x = next(norms)(branch(x) + x * 2.0)
        return x


class Rearranged(nn.Module):
    """Cut a map into windows (B, 2, 2, 2, 2, D) of neighbors or of a grid, or join them."""

    def __init__(self, *axes: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.axes, self.shape = axes, shape

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (2, 2)).unflatten(-1, (2, 2)) if x.ndim == 4 else x
        return x.permute(self.axes).reshape(-1, *self.shape)


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def triple() -> nn.Sequential:
    """MaxViT's: a convolution, attention in windows, attention in a grid, in one Sequential."""
    windows, image = (2, 2, 2, 2, D), (D, 4, 4)
    convolution = nn.Sequential(nn.Conv2d(D, 2 * D, 1), nn.GELU(), nn.Conv2d(2 * D, D, 3, padding=1))
    return nn.Sequential(
        Residual(convolution),
        Rearranged(0, 2, 4, 3, 5, 1, shape=windows),
        Residual(Attention()),
        Residual(mlp()),
        Rearranged(0, 5, 1, 3, 2, 4, shape=image),
        Rearranged(0, 3, 5, 2, 4, 1, shape=windows),
        Residual(Attention()),
        Residual(mlp()),
        Rearranged(0, 5, 3, 1, 4, 2, shape=image),
    )


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a map, with weights of shape (1, D, 1, 1), and no attribute `eps`."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(1, D, 1, 1)), nn.Parameter(torch.zeros(1, D, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance = torch.var(x, dim=1, unbiased=False, keepdim=True)
        return (x - x.mean(1, keepdim=True)) / (variance + 1e-5).sqrt() * self.g + self.b


class MapAttention(nn.Module):
    """Attention over a map, by 1×1 convolutions, and einsum with spaces in its equation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q = ChannelNorm(), nn.Conv2d(D, D, 1, bias=False)
        self.kv, self.out = nn.Conv2d(D, 2 * D, 1, bias=False), nn.Conv2d(D, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (t.flatten(2).unflatten(1, (HEADS, -1)).mT for t in (self.q(y), *self.kv(y).chunk(2, 1)))
        weights = torch.einsum("b h i d, b h j d -> b h i j", q, k).softmax(-1)
        return self.out(torch.einsum("b h i j, b h j d -> b h i d", weights, v).mT.flatten(1, 2).view(x.shape))


def map_mlp() -> nn.Sequential:
    return nn.Sequential(ChannelNorm(), nn.Conv2d(D, 2 * D, 1), nn.GELU(), nn.Conv2d(2 * D, D, 1))


class PlainNorm(nn.Module):
    """LayerNorm by its function, with its own names of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(D))
        self.register_buffer("beta", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class SplitClass(Pairs):
    """Jumbo: class tokens have an MLP of their own, larger than that of the patches, and in all blocks the same."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 2, D))
        self.wide = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 9 * D), nn.GELU(), nn.Linear(9 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens.expand(len(x), -1, -1)
        for attention, feed in self.layers:
            y = torch.cat([tokens, x], 1)
            tokens, x = (attention(y) + y).split([2, x.shape[1]], 1)
            x = feed(x) + x
            tokens = self.wide(tokens) + tokens
        return x + tokens.mean(1, keepdim=True)


class WideClass(Pairs):
    """Jumbo: a class token of three widths attends as three tokens, and has an MLP of its own, shared by all blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 3, D))
        self.wide = nn.Sequential(nn.Flatten(), nn.Linear(3 * D, 9 * D), nn.GELU(), nn.Linear(9 * D, 3 * D))
        self.split = nn.Unflatten(1, (3, D))

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), -1, -1)
        for attention, feed in self.layers:
            y = torch.cat([token, x], 1)
            y = attention(y) + y
            token, x = y[:, :3], y[:, 3:]
            x = feed(x) + x
            token = self.split(self.wide(token)) + token
        return x + token.mean(1, keepdim=True)


class TwoNorms(nn.Module):
    """One norm for the first token, one for all others."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [norm(part) for norm, part in zip(self.norms, x.split([1, x.shape[1] - 1], 1), strict=True)], 1
        )


def with_two_norms(inside: nn.Module) -> nn.Sequential:
    return nn.Sequential(TwoNorms(), inside)


class Decoder(nn.Module):
    """Queries attend to themselves and to patches, in torch's own blocks: an encoder of one, a decoder of one."""

    def __init__(self, norm_first: bool, make: type[nn.TransformerDecoderLayer] = nn.TransformerDecoderLayer) -> None:
        super().__init__()
        sizes = (D, 2, 2 * D, 0.0)
        self.encoder = nn.TransformerEncoderLayer(*sizes, batch_first=True, norm_first=norm_first)
        self.decoder = make(*sizes, batch_first=True, norm_first=norm_first)
        self.queries = nn.Parameter(torch.randn(1, 5, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.queries.expand(len(x), -1, -1), self.encoder(x))


class FurtherBranch(nn.TransformerDecoderLayer):
    """The patches attend to the queries in the end, as in SAM: what the MLP adds is read inside the block."""

    def forward(self, tgt: Tensor, memory: Tensor) -> Tensor:
        y = super().forward(tgt, memory)
        self.memory = self.multihead_attn(memory, y, y)[0]
        return y


class GatedAttention(Attention):
    """The output is gated by the tokens that enter, before the last matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = self.qkv(y).unflatten(-1, (3, HEADS, D // HEADS)).movedim(-3, 0).transpose(-3, -2)
        heads = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)
        return self.out(heads * self.gate(y).sigmoid())


class Experts(nn.Module):
    """A mixture of experts whose weights are three-dimensional: no attention, though weights of a softmax sum it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(D), nn.Linear(D, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, D, 2 * D) / 9), nn.Parameter(torch.randn(3, 2 * D, D) / 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        hidden = torch.einsum("bnd,edh->bneh", x, self.up).relu()
        return torch.einsum("bneh,ehd,bne->bnd", hidden, self.down, self.router(x).softmax(-1))


STRUCTURES: dict[str, Callable[[], nn.Module]] = {
    "summed branches": lambda: Vit(Pairs(lambda: Summed(Attention), lambda: Summed(mlp))),
    "several lanes": lambda: Vit(Lanes()),
    "normalized weights": lambda: Vit(Sphere(), norm=nn.Identity()),
    "scaled stream": lambda: Vit(Scaled()),
    "triple": lambda: Vit(triple(), as_image=True),
    "maps": lambda: Vit(Pairs(MapAttention, map_mlp), as_image=True, norm=PlainNorm()),
    "gated attention": lambda: Vit(Pairs(GatedAttention)),
    "experts": lambda: Vit(Pairs(feed=Experts)),
    "wide class token": lambda: Vit(WideClass()),
    "two norms": lambda: Vit(
        Pairs(lambda: with_two_norms(Attention(norm=False)), lambda: with_two_norms(mlp(norm=False)))
    ),
}


def build(name: str) -> nn.Module:
    """Return a model of the list, in eval mode, always with the same weights."""
    torch.manual_seed(0)
    return STRUCTURES[name]().eval()
