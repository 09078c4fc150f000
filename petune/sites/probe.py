"""One forward without gradient: which modules are called, when, with what; and what comes out."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError, PetuneError
from petune.sites.forward import dtype_of, looking
from petune.sites.site import Sites
from petune.sites.trace import logits_in, tensors_in


@dataclass
class Call:
    """The first call of a module.

    Attributes:
        start, stop: Places in the order of all entries and exits that were watched.
        input: Its first argument.
        output: What it returned.
    """

    start: int
    stop: int = -1
    input: Any = None
    output: Any = None


def probe(model: nn.Module, sites: Sites, watched: Iterable[nn.Module]) -> dict[int, Call]:
    """Run the model on one black image in eval mode.

    Args:
        model: Modes and random state are as before afterwards.
        sites: Of the model.
        watched: The modules to tell of.

    Returns:
        By identity of the module; one that was not called is missing.

    Raises:
        AttachError: The forward fails.
    """
    calls: dict[int, Call] = {}
    clock = iter(range(10**9))

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if id(module) not in calls:
            calls[id(module)] = Call(next(clock), input=next(iter((*args, *kwargs.values())), None))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = calls[id(module)]
        if call.stop < 0:
            call.stop, call.output = next(clock), output

    handles = [h for m in watched for h in _hooks(m, enter, leave)]
    try:
        _forward(model, torch.zeros(1, *sites.input_size))
    except PetuneError:
        raise
    except Exception as error:  # whatever a model's own code, or an adapter's, makes of what it is given
        raise AttachError(
            f"the forward of {sites.model} must run with the method on it, but raised {type(error).__name__}: {error}. "
            "Use another method on this model; --debug shows where"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def look(model: nn.Module, sites: Sites, count: int = 2) -> Tensor:
    """What the model makes of `count` made-up images, in eval mode.

    They are always the same: a formula's, since a generator's numbers may be others in a later PyTorch. It computes in
    its own number format, whatever autocast is on.
    """
    places = torch.arange(count * math.prod(sites.input_size), dtype=torch.float64)
    x = torch.sin(places**2 / 10).reshape(count, *sites.input_size)
    return logits_of(_forward(model, x))


def refuse_random(model: nn.Module, sites: Sites) -> None:
    """See that the model draws no random numbers in eval mode, or none that its logits depend on.

    Raises:
        AttachError: Two forwards of the same images differ, as those of a masked autoencoder do: it hides other
            patches each time.
    """
    x = torch.randn(2, *sites.input_size, generator=torch.Generator().manual_seed(0))
    x = x.to(next(model.parameters()).device, dtype_of(model))
    with looking(model):
        before = _random_state(x.device)
        first = logits_of(model(x))
        if _random_state(x.device) == before:
            return
        second = logits_of(model(x))
    if not torch.equal(first, second):
        raise AttachError(
            f"a backbone in eval mode must give an image the same logits each time, but {sites.model} draws random "
            f"numbers in its forward, and two differ by {float((second - first).abs().max()):.2g}. If it is dropout, "
            "let it ask self.training; if it hides or shuffles patches for pretraining (a masked autoencoder), build "
            "the classifier on its plain encoder, as transformers' ViTForImageClassification for ViT-MAE"
        )


def _random_state(device: torch.device) -> tuple[object, ...]:
    numpy = sys.modules.get("numpy")
    drawn = str(numpy.random.get_state()) if numpy is not None else ""
    cuda = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    return torch.get_rng_state().numpy().tobytes(), cuda, random.getstate(), drawn


def logits_of(out: Any) -> Tensor:
    """The logits in what a model returns: a tensor, or what is called `logits` there, or the first tensor.

    Raises:
        AttachError: There is no tensor.
    """
    logits = next(tensors_in(logits_in(out)), None)
    if logits is None:
        raise AttachError(
            f"a classifier must return a tensor of logits, or hold one as `logits` or first of a tuple or dict, but "
            f"returned {type(out).__name__}"
        )
    return logits


def _forward(model: nn.Module, x: Tensor) -> Any:
    with looking(model):
        return model(x.to(next(model.parameters()).device, dtype_of(model)))


def _hooks(module: nn.Module, enter: Any, leave: Any) -> tuple[Any, Any]:
    return (
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, prepend=True),
    )


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a 1×1 convolution: one matrix for every pixel."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
