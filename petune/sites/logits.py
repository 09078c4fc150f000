"""The logits of a model: read them from its output, and compute them for fixed images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.base.text import plural
from petune.sites.forward import device_of, dtype_of, forward_of, inference
from petune.sites.input_spec import Inputs
from petune.sites.random_numbers import random_state
from petune.sites.returned import logits_in, tensors_returned
from petune.sites.sites import Sites


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a model returns: a tensor, or what is called `logits` there, or the first tensor.

    Raises:
        AttachError: There is no tensor.
    """
    logits = next(tensors_returned(logits_in(output)), None)
    if logits is None:
        raise AttachError(
            f"the model returned {type(output).__name__}, which holds no tensor. Let it return the logits as a tensor, "
            "as `logits` of an object or dict, or first in a tuple"
        )
    return logits


def synthetic_logits(model: nn.Module, sites: Sites, count: int = 2) -> Tensor:
    """Return the logits (count, classes) for fixed synthetic images, in eval mode.

    The images follow a formula, because a generator's numbers may differ in a later PyTorch. The model computes in its
    own number format, even under autocast.
    """
    return logits_of(forward_of(model, sites.input_spec.synthetic(count)))


def max_difference(x: Tensor, y: Tensor) -> float:
    """Return the largest absolute difference; equal infinities, as logits of masked words are, do not differ."""
    return float((x - y).masked_fill(x == y, 0).abs().max())


def max_value(x: Tensor) -> float:
    """Return the largest absolute value without infinities; 0 if there is no other value."""
    return float(x.masked_fill(x.isinf(), 0).abs().max())


def refuse_random(model: nn.Module, sites: Sites) -> None:
    """Check that the logits in eval mode do not depend on random numbers.

    Raises:
        AttachError: Two forwards of the same images differ, as those of a masked autoencoder do, which hides other
            patches each time.
    """
    if sites.draws_nothing:
        return
    device = device_of(model)
    inputs = sites.input_spec.noise(2).to(device, dtype_of(model))
    with inference(model):
        before = random_state(device)
        first = logits_of(_called(model, inputs))
        if random_state(device) == before:
            return
        second = logits_of(inputs.call(model))
    if not torch.equal(first, second):
        raise AttachError(
            f"{sites.model} draws random numbers in eval mode: two forwards of the same images differ by "
            f"{float((second - first).abs().max()):.2g}. If it is dropout, apply it only if self.training; if it hides "
            "or shuffles patches for pretraining (a masked autoencoder), build the classifier on its plain encoder, as "
            "transformers' ViTForImageClassification for ViT-MAE"
        )


def _called(model: nn.Module, inputs: Inputs) -> Any:
    """Return what a model returns, for the first forward with its real weights."""
    try:
        return inputs.call(model)
    except Exception as error:  # whatever a model's own code raises
        empty = [key for key, p in model.named_parameters() if p.is_meta]
        message = f"the forward of {type(model).__name__} fails: {type(error).__name__}: {error}"
        if empty:
            message += f". {plural(len(empty), 'parameter')} on the meta device, such as {empty[0]}, need values first"
        raise AttachError(message) from error
