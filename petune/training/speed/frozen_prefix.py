"""Split a model's forward into a frozen prefix, whose results can be cached, and the rest.

The prefix ends where the first module with trainable parameters is entered: a block, the final norm or the classifier.
What enters that module is cached. The rest is the model's own forward, run on one blank image: modules of the prefix
return constants, and where the prefix ends the cached tensor takes the place of what the blank image has become.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.injector.attachment import Attachment
from petune.injector.hooks.base import first_tensor, with_first_tensor
from petune.sites.forward import undisturbed
from petune.sites.recorder import record

MIN_SHARE = 0.2
"""The least share of the model's parameters that a prefix must hold; less is not worth reading from disk."""

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape (without the batch) and dtype of a cached tensor."""


@dataclass(frozen=True)
class FrozenPrefix:
    """The part of a model that computes the same for an image in every epoch.

    Attributes:
        model: The model.
        entries: Modules whose input is cached, in the order of the forward. The last one is where the prefix ends; a
            method that reads the input of frozen blocks as well (LST) has more.
        skipped: Modules that need not run, and what each returns for a blank image.
        kinds: What is cached per image, one for each entry.
        image_shape: (channels, height, width).
    """

    model: nn.Module
    entries: tuple[nn.Module, ...]
    skipped: Mapping[nn.Module, Any]
    kinds: tuple[Kind, ...]
    image_shape: tuple[int, ...]

    @property
    def bytes_per_image(self) -> int:
        """How much is cached per image."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.kinds)

    def compute(self, x_BCHW: Tensor) -> list[Tensor]:
        """Return what is to be cached of these images, (B, …) per entry; the forward stops there."""
        return _inputs_of(self.entries, self.model, x_BCHW)

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        """Return the model's output for images whose cached values are given, (B, …) per entry."""
        blank_1CHW = torch.zeros(1, *self.image_shape, device=values[0].device)
        constants = {module: _returning(output) for module, output in self.skipped.items()}
        with _forwards(constants), _entered_with(dict(zip(self.entries, values, strict=True))):
            out: Tensor = self.model(blank_1CHW)
        return out


def find_prefix(attachment: Attachment, x_BCHW: Tensor) -> FrozenPrefix | None:
    """Return the frozen prefix of a model, or None if there is none that is worth caching.

    Args:
        attachment: Its model is in train mode. Random state and buffers are the caller's to restore.
        x_BCHW: Two different images or more.
    """
    model = attachment.model
    entries = _entries(attachment)
    skipped = _modules_before(entries[-1], attachment) if entries else []
    if not skipped or any(not _is_frozen(module) for module in skipped):
        return None
    in_prefix = sum(p.numel() for module in skipped for p in module.parameters())
    if in_prefix < MIN_SHARE * sum(p.numel() for p in model.parameters()):
        return None
    values = _inputs_of(entries, model, x_BCHW)
    if len(values) != len(entries) or any(len(v) != len(x_BCHW) or v.requires_grad for v in values):
        return None  # rows that are windows, not images
    outputs = _outputs_of(skipped, model, torch.zeros_like(x_BCHW[:1]))
    kinds = tuple((tuple(v.shape[1:]), v.dtype) for v in values)
    return FrozenPrefix(model, entries, outputs, kinds, tuple(x_BCHW.shape[1:]))


def _entries(attachment: Attachment) -> tuple[nn.Module, ...]:
    """The first module with trainable parameters, after frozen ones whose input an adapter reads; () if there is none.

    It is looked for among blocks, final norm and classifier: anything that trains elsewhere means no prefix.
    """
    sites = attachment.sites
    candidates = [*sites.blocks, *(sites.parts[role] for role in ("norm", "head") if role in sites.parts)]
    trainable = {id(p) for p in attachment.model.parameters() if p.requires_grad}
    inside = [{id(p) for m in site.modules for p in m.parameters()} for site in candidates]
    start = next((number for number, ids in enumerate(inside) if ids & trainable), None)
    if start is None or (sites.blocks and start == 0) or trainable - set().union(*inside[start:]):
        return ()
    read = {id(site.enter) for placed in attachment.edit_log.placed for site in placed.sites[:-1]}
    below = [site.enter for site in candidates[:start] if id(site.enter) in read]
    return (*below, candidates[start].enter)


def _modules_before(entry: nn.Module, attachment: Attachment) -> list[nn.Module]:
    """The outermost modules with parameters that are left before `entry` is entered."""
    calls = record(attachment.model, attachment.sites.input_size).calls
    start = next((call.start for call in calls if call.module is entry), 0)
    before = [call for call in calls if call.stop < start]
    outermost = [call for call in before if call.parent is not None and call.parent.stop > start]
    return [call.module for call in outermost if any(True for _ in call.module.parameters())]


def _is_frozen(module: nn.Module) -> bool:
    in_train_mode = any(m.training for m in module.modules())
    return not in_train_mode and not any(p.requires_grad for p in module.parameters())


class _Reached(Exception):
    """Stops a forward whose rest is not needed."""


def _inputs_of(entries: Sequence[nn.Module], model: nn.Module, x_BCHW: Tensor) -> list[Tensor]:
    inputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs[module] = first_tensor(args, kwargs)
        if module is entries[-1]:
            raise _Reached

    with torch.no_grad(), suppress(_Reached), _hooked(dict.fromkeys(entries, keep)):
        model(x_BCHW)
    return [inputs[entry] for entry in entries if entry in inputs]


def _outputs_of(modules: Sequence[nn.Module], model: nn.Module, x_BCHW: Tensor) -> dict[nn.Module, Any]:
    outputs: dict[nn.Module, Any] = {}

    def recording(module: nn.Module) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs[module] = original(*args, **kwargs)
            return outputs[module]

        return forward

    with torch.no_grad(), undisturbed(model), _forwards({module: recording(module) for module in modules}):
        model(x_BCHW)
    return outputs


def _entered_with(values: Mapping[nn.Module, Tensor]) -> Any:
    def replacing(value: Tensor) -> Callable[..., Any]:
        return lambda module, args, kwargs: with_first_tensor(args, kwargs, value)

    return _hooked({module: replacing(value) for module, value in values.items()})


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these pre-hooks run, before those of any adapter."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def _forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these modules have another `forward`; their hooks still run."""
    own = {module: module.__dict__.get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, before in own.items():
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before
