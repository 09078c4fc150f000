"""Show what the blocks of a model attend to: attention roll-out over the image.

Shapes: B batch, N tokens, H and W rows and columns of patches, S side of the image in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from petune.serving.predict import Predictor
from petune.sites.attention_weights import record_attention
from petune.sites.sites import Sites


def attention_maps(predictor: Predictor, x_BCHW: Tensor) -> Tensor | None:
    """Return the share of each patch in the last block's output, 0 to 1, float32 (B, H, W).

    The roll-out of Abnar and Zuidema, 2020 (2005.00928): each block mixes tokens by the mean of its attention weights
    and the identity, which represents the residual connection. The map is the row of the class token, or the mean of
    the rows of all patches where there is none.

    Returns:
        None if the weights of the last block are not over all patches: windows, pooled or linear attention, no grid.
    """
    sites = predictor.sites
    with record_attention(sites.all_blocks) as recorded:
        predictor.outputs(x_BCHW)
    weights = [recorded[block.index] for block in sites.all_blocks if block.index in recorded]
    if not sites.all_blocks or sites.all_blocks[-1].index not in recorded:
        return None
    last = weights[-1]
    first_patch = last.shape[-1] - _num_patches(sites)
    if sites.image_grid is None or len(last) != len(x_BCHW) or first_patch < sites.num_prefix_tokens:
        return None
    rollout_BNN = _roll_out([block for block in weights if block.shape == last.shape])
    queries = slice(0, 1) if sites.num_prefix_tokens else slice(first_patch, None)
    map_BN = rollout_BNN[:, queries, first_patch:].mean(1)
    map_BN = map_BN - map_BN.amin(1, keepdim=True)
    return (map_BN / map_BN.amax(1, keepdim=True).clamp(min=1e-12)).view(-1, *sites.image_grid).cpu()


def _num_patches(sites: Sites) -> int:
    rows, columns = sites.image_grid or (0, 0)
    return rows * columns


def _roll_out(weights: Sequence[Tensor]) -> Tensor:
    """Multiply the mixing matrices of blocks, from first to last, (B, N, N)."""
    identity = torch.eye(weights[0].shape[-1], device=weights[0].device)
    rollout_BNN = identity.expand_as(weights[0])
    for weights_BNN in weights:
        rollout_BNN = (weights_BNN + identity) / 2 @ rollout_BNN
    return rollout_BNN


def over_image(pixels_SS3: NDArray[np.uint8], map_HW: Tensor) -> NDArray[np.uint8]:
    """Color an image, uint8 (S, S, 3), by a map of 0 to 1."""
    from matplotlib import colormaps

    size = list(pixels_SS3.shape[:2])
    smooth = F.interpolate(map_HW[None, None], size, mode="bilinear", align_corners=False)[0, 0].numpy()
    colors = colormaps["inferno"](smooth)[..., :3] * 255
    blended: NDArray[np.uint8] = (0.4 * pixels_SS3 + 0.6 * colors).round().astype(np.uint8)
    return blended
