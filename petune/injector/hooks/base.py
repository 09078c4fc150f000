"""Holders of adapters: what an edit adds to a model, with the hooks that call the adapter.

A holder is a named submodule near its site. Its hooks are its own bound methods, so a deep copy or a pickle of the
model binds them to its own adapters. Between two hooks a tensor is kept on the holder, and nowhere else.
Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.author import forward_of
from petune.base.errors import AttachError
from petune.sites.site import Layout

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Part = tuple[int, int] | None
"""First channel, and the one after the last, of a part of a module's output; None is all of it."""

PHASE = "petune_phase"
"""Attribute of a module that an adapter of `Edit.around` surrounds: what the present call of it is."""
CALLED, INNER, SKIPPED = 0, 1, 2
"""A call by the model's own code; one by an adapter, as its `inner`; the rest of the model's call, which only passes on
what the adapter has returned."""


class Holder(nn.Module):
    """Base of all holders. With `enabled` False the model runs as if nothing were attached.

    An adapter may call a module of the backbone. Other adapters act there, but the calling one does not, so that it
    can call the module that it is attached to and never calls itself.
    """

    is_petune_module = True
    running = False
    """True while the adapter runs."""
    resting = False
    """True while the model is looked into without it."""
    between = False
    """True if it acts on a tensor between modules."""
    reads_output = False
    """True if it reads what leaves its sites."""
    passed: tuple[str, ...] = ()
    """Paths of the sites that the forward must pass for the adapter to be called."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter
        self.enabled = True
        self.aux_losses: list[Tensor] = []

    def acts_at(self, module: nn.Module) -> bool:
        """Return True if a hook on `module` does something now.

        The adapter is enabled and is not what calls the module, and another adapter has not done the module's work.
        """
        return self.enabled and not self.running and not self.resting and phase_of(module) != SKIPPED

    def run(self, x: Any) -> Tensor:
        """Return what the adapter makes of `x`; modules that it calls run without it."""
        return self.checked(self.call(in_dtype_of(self.adapter, x)))

    def checked(self, y: Any) -> Tensor:
        """Return what the adapter has returned, which must be a tensor."""
        if isinstance(y, Tensor):
            return y
        raise AttachError(f"{described(self.adapter)} returned a {type(y).__name__}. Let it return a tensor")

    def call(self, *args: Any) -> Any:
        """Call the adapter, and take its auxiliary loss, which must not stay on it."""
        self.running = True
        try:
            is_nested = isinstance(args[0], Tensor) and args[0].is_nested
            y = self._adapted_nested(args[0]) if is_nested else self.adapter(*args)
        finally:
            self.running = False
        if getattr(self.adapter, "aux_loss", None) is not None:
            self._take_aux_loss()
        return y

    def _take_aux_loss(self) -> None:
        """Keep the loss for `Attachment.aux_loss`, once for each forward that trains."""
        loss = self.adapter.aux_loss
        self.adapter.aux_loss = None  # type: ignore[assignment]
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
            raise AttachError(
                f"aux_loss of the adapter {type(self.adapter).__name__} is {found}. Set a scalar tensor in its forward"
                ", such as a mean over images and tokens"
            )
        if torch.is_grad_enabled() and self.adapter.training and not in_backward():
            self.aux_losses.append(loss)

    def _adapted_nested(self, x: Tensor) -> Any:
        try:
            y = self.adapter(x)
        except Exception as error:  # PyTorch has few operations for nested tensors
            if not is_failure(error):
                raise
            raise AttachError(
                f"the adapter {type(self.adapter).__name__} cannot compute with a nested tensor, whose images have "
                f"different numbers of tokens ({type(error).__name__}: {error}). Use images of one size, or another "
                "method, such as adaptformer"
            ) from error
        return y

    def snapshot(self) -> Any:
        """Return what is kept between two hooks now; an adapter around one of them goes back to it for each call."""
        return None

    def restore(self, snapshot: Any) -> None:
        """Keep again what was kept at a snapshot."""

    def find_again(self, x: Tensor) -> None:
        """Keep again what came with a tensor, for a repetition that begins with it."""

    def clear(self) -> None:
        """Drop tensors that are kept between two hooks."""
        self.aux_losses = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "aux_losses": []}  # a copy of a model must not carry an activation


class Before(Holder):
    """Replaces the input of a module by `adapter(input)`."""

    def __init__(self, adapter: nn.Module, layout: Layout) -> None:
        super().__init__(adapter)
        self.layout = layout

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Replace the input; pre-hook of the site."""
        if not self.acts_at(module):
            return None
        x = first_tensor(args, kwargs)
        y = shaped_like(self.run(to_channels_last(x, self.layout)), x, self.layout, self.adapter)
        return with_first_tensor(args, kwargs, y)


class After(Holder):
    """Replaces the output of a module, or a part of its channels, by `adapter(output)`."""

    def __init__(self, adapter: nn.Module, layout: Layout, part: Part) -> None:
        super().__init__(adapter)
        self.layout = layout
        self.part = part

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Replace the output; hook of the site."""
        return with_tensor(output, self._changed) if self.acts_at(module) else None

    def _changed(self, x: Tensor) -> Tensor:
        def change(z: Tensor, layout: Layout) -> Tensor:
            return shaped_like(self.run(to_channels_last(z, layout)), z, layout, self.adapter)

        return in_part(self.part, x, self.layout, change)


def in_part(part: Part, x: Tensor, layout: Layout, change: Callable[[Tensor, Layout], Tensor]) -> Tensor:
    """Return `x` with a part of its channels changed; None changes all.

    Args:
        part: First channel, and the one after the last.
        x: What a module returned.
        layout: Its layout.
        change: Maps a tensor and its layout to a tensor of the same shape.
    """
    if part is None:
        return change(x, layout)
    y = to_channels_last(x, layout)
    start, stop = part
    y = torch.cat([y[..., :start], change(y[..., start:stop], "BNC"), y[..., stop:]], -1)
    return y.movedim(-1, 1) if layout == "BCHW" else y


def part_of(x: Tensor, part: Part, layout: Layout) -> Tensor:
    """Return a part of the channels of what a module returned; None is all of them."""
    if part is None:
        return x
    start, stop = part
    return x.narrow(1 if layout == "BCHW" else -1, start, stop - start)


def version_of(x: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 where PyTorch does not count that."""
    is_counted = not (torch.compiler.is_compiling() or x.is_inference() or x.is_nested)
    return x._version if is_counted else 0


def first_tensor(args: Args, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the tensor that a module is called with: its first positional or, without one, keyword argument."""
    for value in (*args[:1], *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    given = f"a {type(args[0]).__name__}" if args else "no positional argument"
    raise AttachError(
        f"an edited module was called with {given}, not a tensor. Use a method that edits other sites, such as "
        "lora, or let the module take the tokens as its first argument"
    )


def with_first_tensor(args: Args, kwargs: Kwargs, x: Tensor) -> tuple[Args, Kwargs]:
    """Return the arguments with `x` for the first tensor, wherever that occurs (torch's attention gets it thrice)."""
    old = first_tensor(args, kwargs)
    return tuple(x if a is old else a for a in args), {k: x if v is old else v for k, v in kwargs.items()}


def with_tensor(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `output` with its tensor changed; of a tuple, named or not, the first item."""
    if isinstance(output, Tensor):
        return change(output)
    if is_tuple(output) and output and isinstance(output[0], Tensor):
        items = (change(output[0]), *output[1:])
        return items if type(output) is tuple else type(output)._make(items)
    raise _no_tensor(output)


def is_tuple(output: Any) -> bool:
    """Return whether what a module returned is a tuple, or a NamedTuple, which can be made again of other items."""
    return type(output) is tuple or (isinstance(output, tuple) and hasattr(output, "_make"))


def _no_tensor(output: Any) -> AttachError:
    return AttachError(
        f"an edited module returned a {type(output).__name__}. Edit one that returns a tensor, or a tuple that starts "
        "with one"
    )


def tensor_of(output: Any) -> Tensor:
    """Return the tensor that a module returned; of a tuple, the first item."""
    first = output[0] if is_tuple(output) and output else output
    if isinstance(first, Tensor):
        return first
    raise _no_tensor(output)


def phase_of(module: nn.Module) -> int:
    """Return what the present call of a module is: CALLED, INNER or SKIPPED."""
    phase: int = getattr(module, PHASE, CALLED)
    return phase


def live_forward(forward: Any) -> Callable[..., Any] | None:
    """Return a forward that was put on a module, or what it has wrapped if it does nothing any more."""
    while getattr(getattr(forward, "__self__", None), "is_idle", False):
        forward = forward.__self__.original
    return forward  # type: ignore[no-any-return]


def in_backward() -> bool:
    """Return True in a repetition. A compiled model repeats traced operations instead of calling hooks."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_failure(error: Exception) -> bool:
    """Return False for petune's messages, for lack of memory, and for what torch steers a forward with.

    Checkpointing ends a repetition by an exception as soon as it has all that the backward pass needs.
    """
    steers = type(error).__module__.startswith(("torch.utils.checkpoint", "torch._dynamo"))
    return not steers and not isinstance(error, AttachError | torch.OutOfMemoryError)


def to_channels_last(x: Tensor, layout: Layout) -> Tensor:
    """Return (..., D), as adapters get it, whatever the layout of the site."""
    return x.movedim(1, -1) if layout == "BCHW" else x


def described(adapter: nn.Module) -> str:
    """Return `the adapter Mine (mine.py:12)`, with the line of its forward if that is an author's, for messages."""
    return f"the adapter {type(adapter).__name__}{forward_of(type(adapter))}"


def shaped_like(y: Tensor, x: Tensor, layout: Layout, adapter: nn.Module) -> Tensor:
    """Return an adapter's (..., D) output in the shape and the dtype of `x`.

    (B, H, W, D), (B, N, D) and flattened (B·N, D) hold the same tokens in one order. Under autocast the dtype stays
    as it is.
    """
    shape = x.movedim(1, -1).shape if layout == "BCHW" else x.shape
    if y.shape != shape:
        if y.shape[-1] != shape[-1] or y.numel() != shape.numel():
            found = f"{described(adapter)} returned shape {tuple(y.shape)}, but its site has the (..., D) shape "
            if y.shape[:-1] == shape[:-1]:
                raise AttachError(f"{found}{tuple(shape)}. Let it return {shape[-1]} channels, or use another site")
            raise AttachError(
                f"{found}{tuple(shape)}. If the model "
                "pools, drops or merges tokens between what it reads and where it acts, use a method "
                "that edits single layers, such as lora. If the method is your own, let its adapter keep batch, number "
                "of tokens and width"
            )
        y = y.reshape(shape)
    if y.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        y = y.to(x.dtype)
    return y.movedim(-1, 1) if layout == "BCHW" else y


def in_dtype_of(adapter: nn.Module, x: Any) -> Any:
    """Return tokens, or a list of them, in the dtype of an adapter's weights, where autocast does not choose it.

    A model may hold its norms in float32 and its matrices in bfloat16.
    """
    if isinstance(x, list):
        return [in_dtype_of(adapter, item) for item in x]
    weight = next((p for p in adapter.parameters() if p.is_floating_point()), None)
    if weight is None or x.dtype == weight.dtype or not x.is_floating_point():
        return x
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


@contextlib.contextmanager
def resting(model: nn.Module, *kinds: type[Any]) -> Iterator[None]:
    """Let adapters of some kinds do nothing inside the context, to look into the model as if they were not there."""
    holders: list[Any] = [m for m in model.modules() if isinstance(m, kinds) and not m.resting]
    try:
        for holder in holders:
            holder.resting = True
        yield
    finally:
        for holder in holders:
            holder.resting = False


def idempotent(switch: Callable[[bool], None], *, on: bool) -> Callable[[bool], None]:
    """Return a switch that calls `switch` only when its state changes.

    Args:
        switch: Called with True or False.
        on: The state at first.
    """
    state = on

    def set_state(on: bool) -> None:
        nonlocal state
        if on != state:
            switch(on)
            state = on

    return set_state
