"""Check with one backward that a method can train through gradients that the model computes by functions of its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from petune.base.errors import AttachError
from petune.injector.attachment import Attachment
from petune.injector.hooks.base import is_failure
from petune.sites.forward import device_of, dtype_of, inference
from petune.sites.returned import tensors_returned
from petune.sites.undisturbed import undisturbed
from petune.sites.used_parameters import REENTRANT_CHECKPOINT, nodes_of

LOG = logging.getLogger(__name__)


def own_functions(outputs: Iterable[Tensor]) -> list[str]:
    """Return the names of a model's own functions (`torch.autograd.Function`) in the graph of its outputs."""
    own = {type(node).__name__ for node in nodes_of(outputs) if isinstance(node, BackwardCFunction)}
    return sorted(own - {REENTRANT_CHECKPOINT})


def check_backward(attachment: Attachment) -> None:
    """Run one backward of a model with functions of its own, in train mode, with frozen layers in eval mode.

    Reversible layers may record only in train mode what their backward needs.

    Raises:
        AttachError: The backward to what the method trains fails.
    """
    model, trained = attachment.model, [p for p in attachment.tuned.values() if p.requires_grad]
    gradients = [(p, p.grad) for p in model.parameters()]
    with undisturbed(model, math.inf), inference(model), torch.enable_grad():
        model.train()
        images = attachment.sites.input_spec.zeros(2).to(device_of(model), dtype_of(model))
        try:
            outputs = [y for y in tensors_returned(images.call(model)) if y.requires_grad and y.is_floating_point()]
        except Exception:  # a train mode that wants targets
            LOG.debug("no forward in train mode: its backward is not checked", exc_info=True)
            return
        if not trained or not outputs:
            return
        try:
            torch.autograd.grad([y.sum() for y in outputs], trained, allow_unused=True)
        except Exception as error:
            if not is_failure(error):
                raise
            raise AttachError(
                f"{attachment.name} cannot train {attachment.sites.model}: the model computes gradients by functions "
                f"of its own ({', '.join(own_functions(outputs))}), which fail where frozen layers are in eval mode "
                f"({type(error).__name__}: {error}). Use linear, which trains the head alone, or build the model "
                "without such functions (reversible=False)"
            ) from error
        finally:
            for p, gradient in gradients:  # a backward of its own may call another one inside
                p.grad = gradient
