"""A backbone's fingerprint: a digest over its frozen tensors, made once for as long as none of them changes."""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.injector.attachment import Attachment
from petune.injector.hooks.position_bias import REPLACED
from petune.injector.trainable import added_to, named_parameters, trainable_state_of

SAMPLES = 64  # values of each tensor that are compared beside its version
KEPT = 4  # digests a model: methods that train the backbone's own tensors leave those out, each its own


@dataclass(frozen=True)
class _Made:
    """A digest, and what tells that it still holds: the tensors themselves and how they were.

    Attributes:
        tensors: By key; a tensor that has gone cannot be mistaken for another at its place.
        states: Of each: shape, type, address, version, sampled values.
    """

    tensors: dict[str, weakref.ref[Tensor]]
    states: list[Any]
    digest: str


_MADE: weakref.WeakKeyDictionary[nn.Module, list[_Made]] = weakref.WeakKeyDictionary()


def fingerprint(attachment: Attachment) -> str:
    """SHA-256 over the frozen tensors of the backbone, parameters and buffers, by key: name, dtype, shape, bytes.

    To read a whole backbone takes long where many adapters are loaded on it, so what was found is kept beside the model
    until a tensor is another one, lies elsewhere or was written to. PyTorch counts what is written to a tensor, but not
    what goes through its `.data`: for that a few values of each are compared too.

    Raises:
        AttachError: A later attachment trains some of them in place, and did not keep their values.
    """
    frozen = _frozen(attachment)
    states = [_state(tensor) for tensor in frozen.values()]
    known = _MADE.setdefault(attachment.model, [])
    for made in known:
        if made.states == states and _same(made.tensors, frozen):
            return made.digest
    digest = _digest(frozen)
    if None not in states:
        known.append(_Made({key: weakref.ref(tensor) for key, tensor in frozen.items()}, states, digest))
        del known[:-KEPT]
    return digest


def _frozen(attachment: Attachment) -> dict[str, Tensor]:
    moving = {id(t) for t in (*attachment.live_state().values(), *attachment.tuned.values())}
    classifier = attachment.sites.parts.get("head")
    head = {id(p) for m in classifier.modules for p in m.parameters()} if classifier else set()
    skipped = moving | head | added_to(attachment.model)
    out = _classifier_keys(attachment)  # of a task that is not in use it is another module at the same place
    named: dict[str, Tensor] = {**named_parameters(attachment.model), **dict(attachment.model.named_buffers())}
    named |= _replaced(attachment.model)
    frozen = {key: named[key] for key in sorted(named) if id(named[key]) not in skipped and key not in out}
    return _beneath(attachment, frozen)


def head_fingerprint(attachment: Attachment) -> str | None:
    """The same of the classifier's tensors, for an attachment that does not train it; None where there is no other."""
    head = attachment.sites.parts.get("head")
    if attachment.head or head is None:
        return None
    named: dict[str, Tensor] = {}
    for path, module in ((head.path, head.enter), (head.exit_path, head.exit)):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            named[f"{path}.{name}"] = tensor
    moving = {id(t) for t in attachment.live_state().values()}  # `full` moves its statistics, and saves them
    still = {key: named[key] for key in sorted(named) if id(named[key]) not in moving}
    return _digest(_beneath(attachment, still))


def _replaced(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that have another value while prompts are there, as they are without (`petune.anatomy.positions`)."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in getattr(module, REPLACED, {}).items()
        if isinstance(value, Tensor)
    }


def _beneath(attachment: Attachment, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what later attachments have trained in place: they are not there yet when this one is loaded."""
    ledger = trainable_state_of(attachment.model)
    if ledger is None or attachment.edit_log.name not in ledger.claims:
        return tensors
    return {key: ledger.beneath(attachment.edit_log.name, key, tensor) for key, tensor in tensors.items()}


def _classifier_keys(attachment: Attachment) -> set[str]:
    head = attachment.sites.parts.get("head")
    found: set[str] = set()
    for path, module in ((head.path, head.enter), (head.exit_path, head.exit)) if head else ():
        buffers = module.named_buffers() if attachment.head else ()
        found |= {f"{path}.{name}" for name, _ in (*module.named_parameters(), *buffers)}
    return found


def _state(tensor: Tensor) -> Any:
    """What changes with the tensor; None where PyTorch does not say whether it was written to."""
    if tensor.is_inference() or type(tensor) not in {Tensor, nn.Parameter}:
        return None
    values = tensor.detach()
    stride = max(1, values.numel() // SAMPLES)
    flat = values.view(-1) if values.is_contiguous() else values.reshape(-1)
    sampled = flat[::stride].cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), tensor.data_ptr(), tensor._version, sampled


def _same(made: dict[str, weakref.ref[Tensor]], frozen: dict[str, Tensor]) -> bool:
    return made.keys() == frozen.keys() and all(made[key]() is tensor for key, tensor in frozen.items())


def _digest(frozen: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, tensor in frozen.items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
