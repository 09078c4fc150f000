"""Vision Transformers in unusual styles, further from timm than `handwritten_models`.

Each takes (B, 3, 16, 16) and has 3 classes, width 24, 3 blocks; 16 patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D, HEADS, DEPTH, CLASSES = 24, 4, 3, 3


class CausalSelfAttention(nn.Module):
    """nanoGPT's, without the mask."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.n_embd = config.n_head, config.n_embd

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (y.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for y in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class GptMlp(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu, self.dropout = nn.GELU(), nn.Dropout(0.0)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class GptBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn, self.mlp = CausalSelfAttention(config), GptMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    """nanoGPT turned into a ViT: a ModuleDict `transformer`, patches by unfold and a Linear, a class token first."""

    def __init__(self) -> None:
        super().__init__()
        config = SimpleNamespace(n_embd=D, n_head=HEADS, bias=False)
        self.image_size = 16
        blocks = nn.ModuleList([GptBlock(config) for _ in range(DEPTH)])
        self.transformer = nn.ModuleDict(
            {"wte": nn.Linear(48, D), "wpe": nn.Embedding(17, D), "h": blocks, "ln_f": nn.LayerNorm(D)}
        )
        self.cls, self.lm_head = nn.Parameter(torch.randn(1, 1, D)), nn.Linear(D, CLASSES, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer.wte(F.unfold(idx, 4, stride=4).transpose(1, 2))
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = x + self.transformer.wpe(torch.arange(x.shape[1], device=x.device))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))[:, 0]


class Functional(nn.Module):
    """Bare weights in dictionaries, F.linear and F.layer_norm: the only modules are the block and the model."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shapes = {"qkv": (3 * D, D), "proj": (D, D), "fc1": (2 * D, D), "fc2": (D, 2 * D)}
            self.w = nn.ParameterDict({k: nn.Parameter(torch.randn(s) * 0.1) for k, s in shapes.items()})
            self.g = nn.ParameterDict({k: nn.Parameter(torch.ones(D)) for k in ("a", "b")})

        def forward(self, x: Tensor) -> Tensor:
            qkv = F.linear(F.layer_norm(x, (D,), self.g["a"]), self.w["qkv"])
            q, k, v = qkv.unflatten(-1, (3, HEADS, D // HEADS)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + F.linear(y, self.w["proj"])
            return x + F.linear(F.gelu(F.linear(F.layer_norm(x, (D,), self.g["b"]), self.w["fc1"])), self.w["fc2"])

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 16
        self.kernel, self.pos = nn.Parameter(torch.randn(D, 3, 4, 4) * 0.1), nn.Parameter(torch.randn(1, 16, D))
        self.body = nn.Sequential(*(self.Block() for _ in range(DEPTH)))
        self.out = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, stride=4).flatten(2).transpose(1, 2) + self.pos
        return self.out(self.body(x).mean(1))


class Parallel22B(nn.Module):
    """As in ViT-22B: one Linear makes q, k, v and the MLP's hidden units, one maps them back; norms of q and k."""

    def __init__(self) -> None:
        super().__init__()
        self.ln, self.qn, self.kn = nn.LayerNorm(D), nn.LayerNorm(D // HEADS), nn.LayerNorm(D // HEADS)
        self.wi, self.wo = nn.Linear(D, 3 * D + 4 * D), nn.Linear(D + 4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, h = self.wi(self.ln(x)).split([D, D, D, 4 * D], -1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(self.qn(q), self.kn(k), v).transpose(1, 2).flatten(2)
        return x + self.wo(torch.cat([y, F.gelu(h)], -1))


class ConvStemLast(nn.Module):
    """A convolutional stem, a class token after the patches, and any trunk."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.image_size = 16
        self.stem = nn.Sequential(
            nn.Conv2d(3, D // 2, 3, 2, 1), nn.BatchNorm2d(D // 2), nn.ReLU(), nn.Conv2d(D // 2, D, 3, 2, 1)
        )
        self.token, self.pos = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(17, D))
        self.trunk, self.ln, self.fc = trunk, nn.LayerNorm(D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        x = torch.cat([x, self.token.expand(len(x), 1, D)], 1) + self.pos
        return self.fc(self.ln(self.trunk(x))[:, -1])


class Reversible(nn.Module):
    """Reversible blocks: two streams, y1 = x1 + attn(x2), y2 = x2 + mlp(y1), on (B, N, 2, D) stacked."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = SimpleNamespace(n_embd=D, n_head=HEADS, bias=True)
            self.f = nn.Sequential(nn.LayerNorm(D), CausalSelfAttention(config))
            self.g = nn.Sequential(nn.LayerNorm(D), GptMlp(config))

        def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
            y1 = x1 + self.f(x2)
            return y1, x2 + self.g(y1)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        a = b = x
        for block in self.blocks:
            a, b = block(a, b)
        return (a + b) / 2


class Experts(nn.Module):
    """A mixture of experts instead of an MLP: a router weighs all experts for every token (soft, batch-independent)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class Switch(nn.Module):
    """A sparse mixture: each token goes to one expert, gathered by index."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 2, bias=False)
        self.up = nn.Parameter(torch.randn(2, D, 2 * D) * 0.1)
        self.down = nn.Parameter(torch.randn(2, 2 * D, D) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.sigmoid(self.router(x))
        best = logits.argmax(-1)
        hidden = F.relu(torch.einsum("bnd,edh->bneh", x, self.up))
        out = torch.einsum("bneh,ehd->bned", hidden, self.down)
        picked = out.gather(2, best[..., None, None].expand(-1, -1, 1, D)).squeeze(2)
        return picked * logits.gather(-1, best[..., None])


class MoeBlock(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        config = SimpleNamespace(n_embd=D, n_head=HEADS, bias=True)
        self.norms = nn.ModuleDict({"attention": nn.LayerNorm(D), "moe": nn.LayerNorm(D)})
        self.attention, self.moe = CausalSelfAttention(config), experts

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms["attention"](x))
        return x + self.moe(self.norms["moe"](x))


class KerasLike(nn.Module):
    """Layers in a dictionary by name, called with keyword arguments, as a port from Keras does it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.depth = nn.ModuleDict(), DEPTH
        for i in range(DEPTH):
            self.layers[f"ln1_{i}"], self.layers[f"ln2_{i}"] = nn.LayerNorm(D), nn.LayerNorm(D)
            self.layers[f"mha_{i}"] = nn.MultiheadAttention(D, HEADS, batch_first=True)
            self.layers[f"dense1_{i}"], self.layers[f"dense2_{i}"] = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.depth):
            x1 = self.layers[f"ln1_{i}"](x)
            out, _ = self.layers[f"mha_{i}"](query=x1, key=x1, value=x1)
            x2 = x + out
            x3 = F.gelu(self.layers[f"dense1_{i}"](self.layers[f"ln2_{i}"](x2)))
            x = x2 + self.layers[f"dense2_{i}"](x3)
        return x


class KeywordBlock(nn.Module):
    """A block that is called by keyword, with a mask, and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        config = SimpleNamespace(n_embd=D, n_head=HEADS, bias=True)
        self.pre, self.post = nn.RMSNorm(D), nn.RMSNorm(D)
        self.attn, self.w1 = CausalSelfAttention(config), nn.Linear(D, 2 * D)
        self.w2, self.w3 = nn.Linear(2 * D, D), nn.Linear(D, 2 * D)

    def forward(self, *, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        hidden = hidden + self.attn(x=self.pre(hidden))
        gated = self.post(hidden)
        return hidden + self.w2(F.silu(self.w1(gated)) * self.w3(gated)), mask


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleDict({f"block{i}": KeywordBlock() for i in range(DEPTH)})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.stack.values():
            x, _ = block(hidden=x, mask=None)
        return x


class ClassAttention(nn.Module):
    """CaiT's: only the class token attends; it follows blocks that have no class token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.kv, self.o = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.mlp = GptMlp(SimpleNamespace(n_embd=D, bias=True))

    def forward(self, cls: Tensor, x: Tensor) -> Tensor:
        u = self.norm(torch.cat([cls, x], 1))
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(u[:, :1]), *self.kv(u).chunk(2, -1)))
        cls = cls + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return cls + self.mlp(self.norm2(cls))


class Cait(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = SimpleNamespace(n_embd=D, n_head=HEADS, bias=True)
        self.image_size = 16
        self.embed, self.pos = nn.Conv2d(3, D, 4, 4), nn.Parameter(torch.randn(1, 16, D))
        self.sa = nn.Sequential(*(GptBlock(config) for _ in range(DEPTH)))
        self.ca, self.cls = ClassAttention(), nn.Parameter(torch.randn(1, 1, D))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sa(self.embed(x).flatten(2).mT + self.pos)
        return self.head(self.norm(self.ca(self.cls.expand(len(x), -1, -1), x))[:, 0])


class SequenceFirst(nn.Module):
    """(N, B, D) inside, as in fairseq and in CLIP's first code."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, HEADS, 2 * D, 0.0, "gelu", norm_first=True)
        self.layers = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.permute(1, 0, 2)).permute(1, 0, 2)


class Tied(nn.Module):
    """Different blocks that share one MLP."""

    def __init__(self) -> None:
        super().__init__()
        config = SimpleNamespace(n_embd=D, n_head=HEADS, bias=True)
        self.blocks = nn.ModuleList(GptBlock(config) for _ in range(DEPTH))
        for block in self.blocks:
            block.mlp = self.blocks[0].mlp

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Windows(nn.Module):
    """Works in windows of 2×2 and joins them at its end; 4 windows of 4 tokens have the shape of a 4×4 image."""

    def __init__(self) -> None:
        super().__init__()
        config = SimpleNamespace(n_embd=D, n_head=HEADS, bias=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn, self.mlp = CausalSelfAttention(config), GptMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.swapped(x).view(-1, 4, 4, D)
        x = x + self.attn(self.ln_1(x).flatten(0, 1)).view(x.shape)
        x = x + self.mlp(self.ln_2(x))
        return self.swapped(x)

    def swapped(self, x: Tensor) -> Tensor:
        """Return windows as rows, or rows as windows: (B, 16, D)."""
        return x.reshape(-1, 2, 2, 2, 2, D).transpose(2, 3).reshape(-1, 16, D)


class WindowViT(nn.Module):
    """Blocks that work in windows; the mean of all patches is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 16
        self.stem, self.blocks = nn.Conv2d(3, D, 4, 4), nn.Sequential(*(Windows() for _ in range(DEPTH)))
        self.ln, self.out = nn.LayerNorm(D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.ln(self.blocks(self.stem(x).flatten(2).mT)).mean(1))


def _stack(make: Callable[[], nn.Module]) -> nn.Module:
    return ConvStemLast(nn.Sequential(*(make() for _ in range(DEPTH))))


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "nanoGPT": Gpt,
    "functional": Functional,
    "ViT-22B in one Linear": lambda: _stack(Parallel22B),
    "reversible": lambda: ConvStemLast(Reversible()),
    "soft experts": lambda: _stack(lambda: MoeBlock(Experts())),
    "one expert a token": lambda: _stack(lambda: MoeBlock(Switch())),
    "Keras": lambda: ConvStemLast(KerasLike()),
    "keywords": lambda: ConvStemLast(Keywords()),
    "class attention": Cait,
    "sequence first": lambda: ConvStemLast(SequenceFirst()),
    "windows joined at the end": WindowViT,
    "tied MLPs": lambda: ConvStemLast(Tied()),
}


def build(name: str) -> nn.Module:
    """Return a model of the list, in eval mode, always with the same weights."""
    torch.manual_seed(0)
    return UNUSUAL[name]().eval()
