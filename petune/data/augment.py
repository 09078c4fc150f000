"""Augment a whole batch at once, each image by its own row of random numbers; masks move with their images.

The numbers depend only on (seed, epoch, index of the image). The number of workers, the batch size and a resume in
the middle of an epoch therefore do not change what happens to an image.

`petune.data.policy` has the augmentations that work on one image at a time.

Legend: B batch, C channels, H height, W width, K random numbers per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

NUM_DRAWS = 8  # columns: shift y, shift x, flip, brightness?, brightness, contrast?, contrast, angle
Draws = Tensor  # float32 in [0, 1), (B, K)


def random_draws(seed: int, epoch: int, num_images: int) -> NDArray[np.float32]:
    """Return the random numbers of one epoch, (N, K) in [0, 1)."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch << 8 | 1]))
    return generator.random((num_images, NUM_DRAWS), dtype=np.float32)


def epoch_order(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    """Return the order of one epoch, a permutation of 0..N-1."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch << 8])).permutation(num_images)


def image_seeds(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    """Return the seed of each image's own generator in one epoch, int64 (N,)."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch << 8 | 2]))
    return generator.integers(0, 2**63 - 1, num_images)


def frame_seeds(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    """Return what decides the frames of each clip in one epoch, int64 (N,)."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch << 8 | 3]))
    return generator.integers(0, 2**63 - 1, num_images)


def shift(x_BCHW: Tensor, u: Draws, fill: float = 0.0) -> Tensor:
    """Pad by an eighth of the side and crop at a random position (for CIFAR: crop 32, padding 4)."""
    size = x_BCHW.shape[-1]
    pad = max(1, size // 8)
    padded = F.pad(x_BCHW, (pad, pad, pad, pad), value=fill)
    top, left = ((u[:, i] * (2 * pad + 1)).long() for i in (0, 1))
    span = torch.arange(size, device=x_BCHW.device)
    rows = (top[:, None] + span)[:, :, None]
    columns = (left[:, None] + span)[:, None, :]
    batch = torch.arange(len(x_BCHW), device=x_BCHW.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows, columns].permute(0, 3, 1, 2)


def flip(x_BCHW: Tensor, u: Draws, fill: float = 0.0) -> Tensor:
    """Mirror left to right with probability 0.5."""
    return torch.where(u[:, 2, None, None, None] < 0.5, x_BCHW.flip(3), x_BCHW)


def jitter(x_BCHW: Tensor, u: Draws, fill: float = 0.0) -> Tensor:
    """Change brightness and contrast by up to 10 %, each with probability 0.5, as torchvision does.

    The gray that contrast is measured from is the luma of RGB, and the mean of the channels of other images.
    """
    channels = x_BCHW.shape[1]
    shares = [0.2989, 0.587, 0.114] if channels == 3 else [1 / channels] * channels
    weights = torch.tensor(shares, device=x_BCHW.device).view(1, channels, 1, 1)
    brightness = torch.where(u[:, 3] < 0.5, 0.9 + 0.2 * u[:, 4], 1.0)[:, None, None, None]
    contrast = torch.where(u[:, 5] < 0.5, 0.9 + 0.2 * u[:, 6], 1.0)[:, None, None, None]
    x = (x_BCHW * brightness).clamp(0, 255)
    gray = (x * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    return (gray + (x - gray) * contrast).clamp(0, 255)


def rotate(x_BCHW: Tensor, u: Draws, fill: float = 0.0, degrees: float = 15.0) -> Tensor:
    """Rotate by up to `degrees` in either direction."""
    angle = (2 * u[:, 7] - 1) * math.radians(degrees)
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(theta, list(x_BCHW.shape), align_corners=False)
    # grid_sample fills with 0
    return F.grid_sample(x_BCHW - fill, grid, mode="nearest", align_corners=False) + fill


PRESETS: dict[str, tuple[Callable[[Tensor, Draws, float], Tensor], ...]] = {
    "none": (),
    "shift": (shift,),
    "light": (shift, flip),
    "paddle_study": (shift, jitter, flip, rotate),  # in the order of the Paddle study
}
MOVING_PRESETS = {name for name, transforms in PRESETS.items() if {*transforms} <= {shift, flip}}
"""Presets that only move whole pixels, so that images may be uint8."""
COLOR = (jitter,)
"""Functions that do not move pixels, so that masks stay as they are."""


def augment(x_BCHW: Tensor, preset: str, u: Draws) -> Tensor:
    """Apply a preset to images in 0..255, or to all frames of a clip (B, T, C, H, W) alike.

    Corners that are moved into the image are black.
    """
    if x_BCHW.ndim == 5:
        augmented = augment(x_BCHW.flatten(0, 1), preset, u.repeat_interleave(x_BCHW.shape[1], 0))
        return augmented.view(x_BCHW.shape)
    for transform in PRESETS[preset]:
        x_BCHW = transform(x_BCHW, u, 0.0)
    return x_BCHW


def augment_masks(masks_BHW: Tensor, preset: str, u: Draws, ignore_index: int) -> Tensor:
    """Move masks as `augment` moves their images; corners that are moved into the image get `ignore_index`."""
    moved = masks_BHW[:, None].float()
    for transform in PRESETS[preset]:
        if transform not in COLOR:
            moved = transform(moved, u, float(ignore_index))
    return moved[:, 0].to(masks_BHW.dtype)
