"""A NaViT-like model, whose blocks get nested tensors of images of several sizes: adapters are right or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petune
from tests.sampling import sampled
from tests.tiny import randomised

D = 24
IMAGES = [torch.randn(3, *size, generator=torch.Generator().manual_seed(1)) for size in ((16, 16), (8, 24))]
REFUSED = {"convpass", "fact", "repadapter", "vpt"}
METHODS = [record.name for record in petune.list_tuners() if record.is_own and record.name != "peft"]
METHODS += ["peft:ia3", "peft:adalora"]
SAMPLE = {"adaptformer", "fact", "lora", "lst", "repadapter", "vpt"}


class Attention(nn.Module):
    """Two heads; PyTorch's attention of nested tensors asks for a GPU's driver, so each image has a call of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x_BND: Tensor) -> Tensor:
        parts = self.qkv(x_BND).chunk(3, -1)
        if not x_BND.is_nested:
            return self.proj(self.attend(*parts))
        rows = [self.attend(*row) for row in zip(*(part.unbind() for part in parts), strict=True)]
        return self.proj(torch.nested.nested_tensor_from_jagged(torch.cat(rows), x_BND.offsets()))

    def attend(self, *parts: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(-3, -2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)


class Block(nn.Module):
    """A block that computes with dense and with nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(D)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.attn(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


class NaViT(nn.Module):
    """Takes a batch (B, 3, H, W) or a list of images.

    Args:
        always_nested: Make a nested tensor of a batch, too.
    """

    image_size = 16

    def __init__(self, *, always_nested: bool) -> None:
        super().__init__()
        self.always_nested = always_nested
        self.patch = nn.Linear(48, D)
        self.pos_embed = nn.Parameter(torch.randn(8, 8, D) / 10)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, 3)

    def tokens(self, image: Tensor) -> Tensor:
        patches = image.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).flatten(2)
        rows, columns = patches.shape[:2]
        return (self.patch(patches) + self.pos_embed[:rows, :columns]).flatten(0, 1)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        rows = [self.tokens(image) for image in images]
        if isinstance(images, Tensor) and not self.always_nested:
            x_BND = torch.stack(rows)
        else:
            x_BND = torch.nested.nested_tensor(rows, layout=torch.jagged)
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.head(torch.stack([row.mean(0) for row in self.norm(x_BND).unbind()]))


def navit(*, always_nested: bool) -> NaViT:
    torch.manual_seed(0)
    return NaViT(always_nested=always_nested).eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:MaskedEncoder reads the weights:UserWarning")  # of torch's attention
@pytest.mark.parametrize("always_nested", [True, False])
@pytest.mark.parametrize("method", sampled(METHODS, lambda method: method in SAMPLE))
@torch.no_grad()
def test_a_method_computes_with_nested_tensors_or_is_refused(method: str, always_nested: bool) -> None:
    model = navit(always_nested=always_nested)
    plain = model(IMAGES)
    if method in REFUSED and (always_nested or method == "convpass"):
        with pytest.raises(petune.AttachError, match=r"nested tensor|grid of patches"):
            petune.attach(model, method)
        assert torch.equal(model(IMAGES), plain)
        return
    att = randomised(petune.attach(model, method))
    alone = torch.cat([model(image[None]) for image in IMAGES])
    if method in REFUSED:  # what it was attached with was not nested
        with pytest.raises(petune.AttachError, match="nested tensor"):
            model(IMAGES)
    else:
        torch.testing.assert_close(model(IMAGES), alone)
        assert not att.tuned or not torch.allclose(alone, plain, atol=1e-3)
    att.detach()
    assert torch.equal(model(IMAGES), plain)


class MaskedEncoder(nn.Module):
    """Torch's own encoder, which packs tokens with a padding mask into a nested tensor where nothing trains."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 2 * D, 0.0, batch_first=True)
        self.stem, self.encoder, self.head = nn.Linear(8, D), nn.TransformerEncoder(layer, 2), nn.Linear(D, 3)

    def forward(self, patches: Tensor, is_padding: Tensor) -> Tensor:
        x_BND = self.encoder(self.stem(patches), src_key_padding_mask=is_padding)
        logits: Tensor = self.head(x_BND.masked_fill(is_padding[..., None], 0).sum(1))
        return logits


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:MaskedEncoder reads the weights:UserWarning")  # of torch's attention
@pytest.mark.parametrize("method", ["lora", "partial", "adaptformer", "vpt", "lst"])
def test_a_frozen_encoder_of_torch_trains_with_a_padding_mask_or_is_refused(method: str) -> None:
    torch.manual_seed(0)
    model = MaskedEncoder()
    example = {"patches": torch.randn(2, 6, 8), "is_padding": torch.tensor([[False] * 6, [False] * 4 + [True] * 2])}
    if method not in {"lora", "partial"}:  # torch's packed tokens pass no hook
        with pytest.raises(petune.AttachError, match="nested"):
            petune.attach(model, method, example=example)
        model.encoder.use_nested_tensor = False
    petune.attach(model, method, example=example)
    model.train()
    model(**example).sum().backward()
    with torch.no_grad():
        without_gradients = model.eval()(**example)
    torch.testing.assert_close(model(**example), without_gradients)
    assert model.encoder.use_nested_tensor == (method in {"lora", "partial"})
