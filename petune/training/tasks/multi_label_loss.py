"""Losses for several labels an image, made of timm's: one value per image, and one learning rate for all of them.

Legend: N images of the training split, B batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from petune.base.errors import ConfigError
from petune.training.tasks.multi_label_options import MultiLabelConfig

LARGEST_SAMPLE = 4096
CHUNK = 128
TWO_WAY_POSITIVE_TEMPERATURE = 4.0
MASKED = -1e4
"""Used in place of minus infinity in a logsumexp that may have no entry at all."""


def losses_of_images(
    config: MultiLabelConfig, state: dict[str, Any], logits_BC: Tensor, targets_BC: Tensor, smoothing: float
) -> Tensor:
    """Return the loss of each image, (B,); the mean over classes where the loss is a sum over classes.

    Args:
        config: The options of the task.
        state: From `fit`: weights of positives, counts, scale.
        logits_BC: Outputs of the head.
        targets_BC: 0 and 1, or between where labels are mixed.
        smoothing: Moves each target towards 0.5; only for losses that are not in `BINARY_ONLY`.
    """
    targets_BC = targets_BC.float()
    loss_B: Tensor
    if config.loss == "zlpr":
        loss_B = _zlpr(logits_BC, targets_BC)
    elif config.loss == "twoway":
        loss_B = _two_way(logits_BC, targets_BC)
    else:
        loss_B = _criterion(config, state, logits_BC.device, smoothing)(logits_BC, targets_BC).mean(1)
    return loss_B * float(state.get("scale", 1.0))


def gradient_scale(loss: Callable[[Tensor, Tensor], Tensor], targets_NC: Tensor) -> float:
    """Return the factor that gives a loss the gradient of BCE at zero logits, so that a learning rate serves both.

    Without it, losses differ by the number of classes (a sum over them) and by how they weigh easy labels.

    Args:
        loss: From logits and targets to one loss per image.
        targets_NC: Of the training split; 4,096 evenly spaced images are measured.

    Raises:
        ConfigError: The loss has no gradient, or none that is finite.
    """
    sample_NC = targets_NC[:: max(1, len(targets_NC) // LARGEST_SAMPLE)]
    total = 0.0
    for targets_BC in torch.split(sample_NC, CHUNK):
        logits_BC = torch.zeros(targets_BC.shape, requires_grad=True)
        with torch.enable_grad():
            loss(logits_BC, targets_BC).sum().backward()  # type: ignore[no-untyped-call]
        assert logits_BC.grad is not None
        total += float(logits_BC.grad.abs().sum())
    scale = 0.5 * len(sample_NC) / total if total else math.nan
    if not 0 < scale < math.inf:
        raise ConfigError(
            f"the loss has no usable gradient for the labels of the training split (scale {scale:g}): it needs images "
            "with and without each label, and moderate options. Use loss=bce"
        )
    return scale  # BCE has |sigmoid(0) - y| = 1/2, on the mean over the classes


def _criterion(config: MultiLabelConfig, state: dict[str, Any], device: torch.device, smoothing: float) -> Any:
    """Return timm's loss that gives one value per image and class."""
    from timm import loss

    pos_weight = torch.tensor(state["pos_weight"], device=device) if "pos_weight" in state else None
    common = {"smoothing": smoothing, "reduction": "none"}
    if config.loss == "bce":
        return loss.BinaryCrossEntropy(smooth_dense=True, pos_weight=pos_weight, **common)
    if config.loss == "asl":
        gammas = {"gamma_pos": config.gamma_pos, "gamma_neg": config.gamma_neg, "clip": config.clip}
        return loss.AsymmetricLossMultiLabel(pos_weight=pos_weight, **gammas, **common)
    if config.loss == "poly":
        return loss.PolyBinaryCrossEntropy(**common)
    return loss.DistributionBalancedLoss(state["counts"], state["num_images"], **common).to(device)


def _zlpr(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """Return timm's ZlprLoss of each image, (B,): log(1 + sum_neg exp(z)) + log(1 + sum_pos exp(-z))."""
    is_positive_BC = targets_BC > 0.5
    zeros_B1 = logits_BC.new_zeros(len(logits_BC), 1)
    negatives = logits_BC.masked_fill(is_positive_BC, -torch.inf)
    positives = (-logits_BC).masked_fill(~is_positive_BC, -torch.inf)
    terms = [torch.logsumexp(torch.cat([part, zeros_B1], 1), 1) for part in (negatives, positives)]
    return terms[0] + terms[1]


def _two_way(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """Return timm's TwoWayLoss, (B,): its mean over the batch is the loss of the batch.

    One term compares the classes of each image, the other one the images of each class; the latter belongs to the
    whole batch, and every image gets an equal share of it.
    """
    is_positive_BC = targets_BC > 0.5
    temperature = TWO_WAY_POSITIVE_TEMPERATURE
    positives = (-logits_BC / temperature).masked_fill(~is_positive_BC, MASKED)
    negatives = logits_BC.masked_fill(is_positive_BC, MASKED)

    def margins(dim: int) -> Tensor:
        """Return the loss along `dim`, scaled so that its mean is the mean over those with a positive."""
        gap = torch.logsumexp(negatives, dim) + temperature * torch.logsumexp(positives, dim)
        is_valid = is_positive_BC.any(dim)
        return torch.where(is_valid, F.softplus(gap), 0) * (len(is_valid) / is_valid.sum().clamp(min=1))

    return margins(1) + margins(0).mean()
