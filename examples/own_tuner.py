"""A method of your own: scale every channel of the MLP's output. Check that it keeps the contract, then use it.

python examples/own_tuner.py
"""

import timm
import torch
from torch import Tensor, nn

import petune


class ScaleConfig(petune.TunerConfig):
    """Options of the method.

    Attributes:
        init: Value of all scales before training.
    """

    init: float = 1.0


class ChannelScale(nn.Module):
    """y * s, one s for each channel."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), init))

    def forward(self, y: Tensor) -> Tensor:
        """Scale (..., dim)."""
        return y * self.scale


class ScaleTuner(petune.Tuner[ScaleConfig]):
    """Train one scale for each channel of the MLP of every block."""

    recipe = petune.Recipe(lr=1e-2)

    def attach(self, edit: petune.Edit) -> None:
        """Put a ChannelScale after every MLP."""
        for block in edit.sites.require_blocks():
            edit.after(block.mlp, ChannelScale(block.dim, self.config.init))


petune.check_tuner(ScaleTuner())  # attaches, trains, saves and detaches it on a small model
model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, num_classes=10)
print(petune.attach(model, ScaleTuner()))
