"""Small ViTs of several kinds, for tests of PEFT's types."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from petune.plugin_dev.tiny_models import tiny_timm, tiny_torchvision, tiny_transformers


class EncoderViT(nn.Module):
    """A ViT of `nn.TransformerEncoderLayer`, which in eval mode runs a fused kernel and calls no module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size = 16
        self.patch_embed = nn.Conv2d(3, 32, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 32))
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BND = self.patch_embed(x_BCHW).flatten(2).transpose(1, 2)
        x_BND = torch.cat([self.cls_token.expand(len(x_BND), -1, -1), x_BND], 1) + self.pos_embed
        return self.head(self.encoder(x_BND)[:, 0])


def encoder_vit() -> nn.Module:
    """Build the ViT of encoder layers with random weights."""
    torch.manual_seed(0)
    model = EncoderViT()
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.1)
    return model.eval()


def timm_vit() -> nn.Module:
    """Build timm's ViT of width 32."""
    return tiny_timm(embed_dim=32)


BASES = {
    "timm": timm_vit,
    "encoder": encoder_vit,
    "torchvision": tiny_torchvision,
    "transformers": tiny_transformers,
}
