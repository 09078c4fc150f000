"""The parts of a comparison with the authors' code: two models on one backbone, and pairs of parameters.

Legend: D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import petune

WIDTH, DEPTH, BOTTLENECK = 768, 2, 8
"""The width is a constant in some of the authors' code."""


def identity(value: Tensor) -> Tensor:
    """Return the value."""
    return value


@dataclass(frozen=True)
class Pair:
    """A parameter of the authors' code and where it is in petune's.

    Attributes:
        official: Theirs.
        own: Petune's, or the backbone's.
        convert: From their layout to petune's.
        select: The part of petune's parameter that it fills.
    """

    official: Tensor
    own: Tensor
    convert: Callable[[Tensor], Tensor] = identity
    select: Callable[[Tensor], Tensor] = identity


@dataclass(frozen=True)
class Built:
    """Both models, with parameters still to be made equal.

    Attributes:
        official, own: Functions of images.
        pairs: The trained parameters.
        attachment: Petune's.
        merge: Merges the authors' adapters into their backbone, if they can.
        term: Returns the authors' own term of the loss after a forward. With one, both are in train mode.
    """

    official: Callable[[Tensor], Tensor]
    own: nn.Module
    pairs: list[Pair]
    attachment: petune.Attachment
    merge: Callable[[], None] | None = None
    term: Callable[[], Tensor] | None = None


def backbone(*, pool: str = "token") -> Any:
    """Return a ViT of two blocks in float64, in which every parameter is random, also norms and biases."""
    torch.manual_seed(0)
    model = VisionTransformer(
        patch_size=16, embed_dim=WIDTH, depth=DEPTH, num_heads=12, num_classes=10, global_pool=pool
    )
    return randomized(model)


def randomized(model: nn.Module) -> Any:
    """Return the model in float64 and eval mode, with something random added to every parameter."""
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def attached(method: str, model: Any = None) -> tuple[Any, petune.Attachment]:
    """Return the backbone, or another model, with a method of petune, in eval mode."""
    model = backbone() if model is None else model
    attachment = petune.attach(model, method)
    for tensor in attachment.tuned.values():
        tensor.data = tensor.data.double()
    model.eval()
    return model, attachment


def copy_weights(model: nn.Module, official: nn.Module, *further: str) -> None:
    """Copy timm's weights into a model with the same names, and with others that contain one of `further`."""
    missing, unexpected = official.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected, unexpected
    assert all(any(part in name for part in further) for name in missing), missing


def same_names(official: nn.Module, attachment: petune.Attachment, place: str, names: dict[str, str]) -> Iterator[Pair]:
    """Yield the pairs of one module; `names` has their submodules by petune's."""
    theirs = dict(official.named_parameters())
    for own_name, their_name in names.items():
        for kind in ("weight", "bias"):
            own = attachment.tuned[f"{place}.adapter.{own_name}.{kind}"]
            yield Pair(theirs[f"{their_name}.{kind}"], own, lambda value, shape=own.shape: value.reshape(shape))
