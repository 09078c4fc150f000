"""Split a model's forward into a frozen prefix, whose results can be cached, and the rest.

The prefix ends where the first modules that train are entered: a block, or the final norm or the classifier. What
enters them is cached. The rest is the model's own forward on a blank image: modules of the prefix return constants, and
where the prefix ends the cached tensors take the place of what the blank image has become.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from petune.injector.attachment import Attachment
from petune.injector.hooks.base import first_tensor, with_first_tensor
from petune.injector.trainable import trainable_state_of
from petune.sites.recorder import record
from petune.sites.undisturbed import undisturbed

MIN_SHARE = 0.2
"""The least share of the model's parameters that a prefix must hold; less is not worth reading from disk."""

Hook = Callable[[nn.Module, Any, Any], Any]
Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape (without the batch) and dtype of a cached tensor."""


@dataclass(frozen=True)
class FrozenPrefix:
    """The part of a model that computes the same for an image in every epoch.

    Attributes:
        model: The model.
        entries: Modules whose input is cached, in the order of the forward.
        skipped: Modules that need not run, and what each returns for a blank image.
        kinds: What is cached per image, one for each entry.
        image_shape: (channels, height, width); of a video with frames.
        is_random: True if dropout or drop path of the backbone acts in it, so that it must not be cached.
        one_blank: Whether one blank image suffices for a whole batch, so that what still runs of the prefix costs
            nothing. A model whose own code counts images needs as many as there are.
    """

    model: nn.Module
    entries: tuple[nn.Module, ...]
    skipped: Mapping[nn.Module, Any]
    kinds: tuple[Kind, ...]
    image_shape: tuple[int, ...]
    is_random: bool = False
    one_blank: bool = True

    @property
    def bytes_per_image(self) -> int:
        """Bytes cached per image."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.kinds)

    def compute(self, x_BCHW: Tensor) -> list[Tensor]:
        """Return what is to be cached of these images, (B, …) per entry; the forward stops there."""
        return _inputs_of(self.entries, self.model, x_BCHW)

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        """Return the model's output for images whose cached values are given, (B, …) per entry."""
        num_blanks = 1 if self.one_blank else len(values[0])
        blank_BCHW = torch.zeros(1, *self.image_shape, device=values[0].device).expand(num_blanks, *self.image_shape)
        constants = {module: _returning(_repeat(output, num_blanks)) for module, output in self.skipped.items()}
        hooks = {entry: _replacing(value) for entry, value in zip(self.entries, values, strict=True)}
        with _forwards(constants), _hooked(hooks):
            out: Tensor = self.model(blank_BCHW)
        return out


def find_prefix(attachment: Attachment, x_BCHW: Tensor) -> FrozenPrefix | None:
    """Return the frozen prefix of a model, or None if there is none that is worth caching.

    Args:
        attachment: Its model is in train mode. Random state and buffers are the caller's to restore.
        x_BCHW: Two different images or more.
    """
    model = attachment.model
    least = MIN_SHARE * sum(p.numel() for p in model.parameters())
    if sum(p.numel() for p in model.parameters() if not p.requires_grad) < least:
        return None  # without a forward
    entries = _entries(attachment, x_BCHW)
    skipped, is_random = _modules_before(entries, attachment) if entries else ([], False)
    if sum(p.numel() for module in skipped for p in module.parameters()) < least:
        return None
    if not is_random and any(m.training for module in skipped for m in module.modules()):
        return None
    values = _inputs_of(entries, model, x_BCHW)
    if len(values) != len(entries) or any(len(value) != len(x_BCHW) for value in values):
        return None  # rows that are windows, not images
    outputs = _outputs_of(skipped, model, torch.zeros_like(x_BCHW[:1]))
    kinds = tuple((tuple(value.shape[1:]), value.dtype) for value in values)
    return FrozenPrefix(model, entries, outputs, kinds, tuple(x_BCHW.shape[1:]), is_random)


def _entries(attachment: Attachment, x_BCHW: Tensor) -> tuple[nn.Module, ...]:
    """Return the modules where the prefix ends, in the order of the forward; () if it is not worth looking for them.

    If a block trains, they are the first such block, and the frozen ones before it whose input an adapter reads (LST).
    A block that an adapter reads the output of, or of a module inside, counts as one that trains: it must run.
    Else they are the modules that own trainable parameters and whose input no gradient reaches.
    """
    blocks = [block.enter for block in attachment.sites.all_blocks]
    placed = [(holder, {*sites[:-1]}) for holder, sites in attachment.edit_log.placed]
    left = {site.exit for holder, sites in placed for site in sites if holder.reads_output}
    trains = [any(p.requires_grad for p in b.parameters()) or any(m in left for m in b.modules()) for b in blocks]
    if True in trains:
        start = trains.index(True)
        read = {id(site.enter) for _, sites in placed for site in sites}
        return (*(block for block in blocks[:start] if id(block) in read), blocks[start]) if start else ()
    entries: dict[nn.Module, None] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not first_tensor(args, kwargs).requires_grad:
            entries[module] = None

    model = attachment.model
    owners = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    with _hooked(dict.fromkeys(owners, keep)):
        model(x_BCHW)
    return tuple(entries)


def _modules_before(entries: Sequence[nn.Module], attachment: Attachment) -> tuple[list[nn.Module], bool]:
    """Return the outermost frozen modules that end before the last of `entries`, and whether anything is random."""
    calls = record(attachment.model, attachment.sites.input_spec).calls
    start = max((call.start for call in calls if call.module in entries), default=0)
    state = trainable_state_of(attachment.model)
    drawing = state.drawing if state is not None else ()
    is_random = any(call.module in drawing for call in calls if call.start < start)
    before = [call for call in calls if call.stop < start]
    outermost = [call.module for call in before if call.parent is not None and call.parent.stop > start]
    return [module for module in outermost if _is_frozen(module)], is_random


def _is_frozen(module: nn.Module) -> bool:
    """Return True if it has parameters and none of them trains."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


class _Reached(Exception):
    """Stops a forward whose rest is not needed."""


def _inputs_of(entries: Sequence[nn.Module], model: nn.Module, x_BCHW: Tensor) -> list[Tensor]:
    inputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs[module] = first_tensor(args, kwargs)
        if len(inputs) == len(entries):
            raise _Reached

    with torch.no_grad(), suppress(_Reached), _hooked(dict.fromkeys(entries, keep)):
        model(x_BCHW)
    return [inputs[entry] for entry in entries if entry in inputs]


def _outputs_of(modules: Sequence[nn.Module], model: nn.Module, x_BCHW: Tensor) -> dict[nn.Module, Any]:
    outputs: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[module] = output

    with torch.no_grad(), undisturbed(model), ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(keep, prepend=True).remove)
        model(x_BCHW)
    return outputs


def _repeat(output: Any, count: int) -> Any:
    """Repeat what a module returned for one image."""

    def repeat(x: Any) -> Any:
        return x.expand(count, *x.shape[1:]) if isinstance(x, Tensor) and x.ndim and x.shape[0] == 1 else x

    return tree_map(repeat, output) if count > 1 else output


def _replacing(value: Tensor) -> Hook:
    return lambda module, args, kwargs: with_first_tensor(args, kwargs, value)


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Run these hooks when their modules are entered, before those of any adapter, inside the context."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)
        yield


@contextmanager
def _forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give these modules another `forward` inside the context; their hooks still run."""
    own = {module: vars(module).get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, before in own.items():
            del vars(module)["forward"]
            if before is not None:
                vars(module)["forward"] = before
