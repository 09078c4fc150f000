"""A head that predicts every pixel of an image from the tokens of a backbone's blocks.

Legend: B batch, D width, H and W rows and columns of tokens, S side of the image, C outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petune.base.arguments import check_arguments
from petune.base.errors import AttachError, ConfigError, UsageError
from petune.injector.trainable import trainable_state_of
from petune.sites.find import find_sites
from petune.training.token_maps import TokenMaps, token_sources

NAME = "dense_head"
"""The name of the head in the model; keys of its tensors start with it."""


class DenseHead(nn.Module):
    """BatchNorm, a linear layer on each token, and bilinear resizing to the size of the image.

    Args:
        dim: Width of the tokens, of all blocks together.
        num_outputs: Outputs for each pixel.
        size: Height and width of the image.
    """

    def __init__(self, dim: int, num_outputs: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.linear = nn.Conv2d(dim, num_outputs, 1)
        self.size = size

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """Map tokens (B, D, H, W) to outputs (B, C, S, S)."""
        return F.interpolate(self.linear(self.norm(x_BDHW)), self.size, mode="bilinear", align_corners=False)


def add_dense_head(
    model: nn.Module, num_outputs: int, *, blocks: str | list[int] = "last:1", seed: int = 0
) -> nn.Module:
    """Let a model predict every pixel: a DenseHead reads the tokens of its blocks, and replaces its classifier.

    The model stays the same module, with the same names. It returns (B, num_outputs, height, width), in the size of
    its input.

    Args:
        model: A Vision Transformer with a grid of patches, columnar or in stages, with nothing attached. Changed in
            place: its classifier becomes the identity.
        num_outputs: Outputs for each pixel.
        blocks: Whose tokens are read: `last:K`, `first:K`, `every:K`, `all`, or a list of numbers. Maps of several
            blocks are resized to the finest and concatenated. Of the last block the tokens are read after the final
            norm, if it has any.
        seed: Seed of the head's weights, trunc_normal(std=0.01); the bias is zero.

    Returns:
        The model.

    Raises:
        ConfigError: The model has no such blocks, or their tokens are no grid of patches.
        AttachError: A method is attached to the model, or it has such a head.
        UsageError: An argument has another type, or is out of range.
    """
    kinds = {"num_outputs": (num_outputs, int), "blocks": (blocks, str | list), "seed": (seed, int)}
    check_arguments("petune.add_dense_head", model=(model, nn.Module), **kinds)
    if num_outputs < 1:
        raise UsageError(f"num_outputs is {num_outputs}. It must be at least 1")
    if trainable_state_of(model) is not None or NAME in model._modules:
        raise AttachError(f"{type(model).__name__} has a method attached, or a head for pixels. Use a plain model")
    sites = find_sites(model)
    if sites.image_grid is None or not sites.blocks or not sites.input_spec.is_image:
        raise ConfigError(f"segmentation needs a grid of patches, and {sites.model} has none. Use another backbone")
    _, height, width = sites.input_size
    sources = token_sources(model, sites, [*sites.choose(blocks).blocks])
    parameter = next(model.parameters())
    head = DenseHead(sum(source.dim for source in sources), num_outputs, (height, width))
    nn.init.trunc_normal_(head.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    if head.linear.bias is not None:
        nn.init.zeros_(head.linear.bias)
    classifier = sites.parts.get("head")
    for path, _ in classifier.named_modules if classifier is not None else ():
        model.set_submodule(path, nn.Identity())
    model.add_module(NAME, head.to(parameter.device, parameter.dtype).train(model.training))
    TokenMaps(model, sources, NAME).hook()
    return model
