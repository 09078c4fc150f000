"""Holders of adapters: what an edit adds to a model, with the hooks that call the adapter.

A holder is a named submodule near its site. Its hooks are its own bound methods, so a deep copy or a pickle of the
model binds them to its own adapters. Between two hooks a tensor is kept on the holder, and nowhere else.
Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.base.text import plural
from petune.sites.site import Layout

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Holder(nn.Module):
    """Base of all holders. With `enabled` False the model runs as if nothing were attached.

    An adapter may call a module of the backbone. Other adapters act there, but the calling one does not, so that it
    can call the module that it is attached to and never calls itself.
    """

    is_petune_module = True
    running = False
    """True while the adapter runs."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter
        self.enabled = True

    @property
    def acts(self) -> bool:
        """True if the hooks do something now: the adapter is enabled, and not what calls their module."""
        return self.enabled and not self.running

    def run(self, x: Any) -> Tensor:
        """Return what the adapter makes of `x`; modules that it calls run without it."""
        self.running = True
        x = in_dtype_of(self.adapter, x)
        try:
            is_nested = isinstance(x, Tensor) and x.is_nested
            y: Tensor = self._adapted_nested(x) if is_nested else self.adapter(x)
        finally:
            self.running = False
        return y

    def _adapted_nested(self, x: Tensor) -> Tensor:
        try:
            y: Tensor = self.adapter(x)
        except AttachError:
            raise
        except Exception as error:  # PyTorch has few operations for nested tensors
            raise AttachError(
                f"the adapter {type(self.adapter).__name__} cannot compute with a nested tensor, whose images have "
                f"different numbers of tokens ({type(error).__name__}: {error}). Use images of one size, or another "
                "method, such as adaptformer"
            ) from error
        return y

    def clear(self) -> None:
        """Drop tensors that are kept between two hooks."""


class Parallel(Holder):
    """Adds `adapter(input of ENTER)` to the output of EXIT."""

    def __init__(self, adapter: nn.Module, enter_layout: Layout, exit_layout: Layout) -> None:
        super().__init__(adapter)
        self.enter_layout = enter_layout
        self.exit_layout = exit_layout
        self.entered: Tensor | None = None

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Keep the input; pre-hook of ENTER."""
        if self.acts:
            self.entered = first_tensor(args, kwargs)

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Add to the output; hook of EXIT. Also called after an exception, with `output` None: nothing stays behind."""
        x, self.entered = self.entered, None
        if output is None or not self.acts:
            return None
        if x is None:
            raise AttachError(
                f"an adapter adds to the output of {type(module).__name__}, but the module whose input it reads was "
                "not called before. Both must be called in this order, in the same segment of gradient checkpointing"
            )
        change = self.run(to_channels_last(x, self.enter_layout))
        return with_tensor(output, lambda y: y + shaped_like(change, y, self.exit_layout))

    def clear(self) -> None:
        self.entered = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "entered": None}  # a copy of a model must not carry an activation


class Gather(Holder):
    """Adds `adapter([input of each of ENTERS])` to the output of EXIT."""

    def __init__(self, adapter: nn.Module, enter_layouts: tuple[Layout, ...], exit_layout: Layout) -> None:
        super().__init__(adapter)
        self.enter_layouts = enter_layouts
        self.exit_layout = exit_layout
        self.entered: list[Tensor] = []

    def enter_first(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Start a new list of inputs; pre-hook of the first of ENTERS. An earlier forward may not have reached EXIT."""
        if self.acts:
            self.entered = [first_tensor(args, kwargs)]

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Keep the input; pre-hook of the others of ENTERS, which are entered in their order."""
        if self.acts:
            self.entered.append(first_tensor(args, kwargs))

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Add to the output; hook of EXIT. Also called after an exception, with `output` None: nothing stays behind."""
        inputs, self.entered = self.entered, []
        if output is None or not self.acts:
            return None
        if len(inputs) != len(self.enter_layouts):
            raise AttachError(
                f"an adapter reads {plural(len(self.enter_layouts), 'site')} in one forward, but entered {len(inputs)} "
                f"before {type(module).__name__} was left. Each must be called once, in one segment of checkpointing"
            )
        pairs = zip(inputs, self.enter_layouts, strict=True)
        change = self.changed([to_channels_last(x, layout) for x, layout in pairs])
        return with_tensor(output, lambda y: y + shaped_like(change, y, self.exit_layout))

    def changed(self, inputs: list[Tensor]) -> Tensor:
        """Return the adapter's output."""
        return self.run(inputs)

    def clear(self) -> None:
        self.entered = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "entered": []}


class Before(Holder):
    """Replaces the input of a module by `adapter(input)`."""

    def __init__(self, adapter: nn.Module, layout: Layout) -> None:
        super().__init__(adapter)
        self.layout = layout

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Replace the input; pre-hook of the site."""
        if not self.acts:
            return None
        x = first_tensor(args, kwargs)
        y = shaped_like(self.run(to_channels_last(x, self.layout)), x, self.layout)
        return with_first_tensor(args, kwargs, y)


class After(Holder):
    """Replaces the output of a module by `adapter(output)`."""

    def __init__(self, adapter: nn.Module, layout: Layout) -> None:
        super().__init__(adapter)
        self.layout = layout

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Replace the output; hook of the site."""
        return with_tensor(output, self._changed) if self.acts else None

    def _changed(self, x: Tensor) -> Tensor:
        return shaped_like(self.run(to_channels_last(x, self.layout)), x, self.layout)


def first_tensor(args: Args, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the tensor that a module is called with: its first positional or, without one, keyword argument."""
    for value in (*args[:1], *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise AttachError("an edited module was called without a tensor as its first argument. Edit another site")


def with_first_tensor(args: Args, kwargs: Kwargs, x: Tensor) -> tuple[Args, Kwargs]:
    """Return the arguments with `x` for the first tensor, wherever that occurs (torch's attention gets it thrice)."""
    old = first_tensor(args, kwargs)
    return tuple(x if a is old else a for a in args), {k: x if v is old else v for k, v in kwargs.items()}


def with_tensor(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `output` with its tensor changed; of a tuple, the first item."""
    if isinstance(output, Tensor):
        return change(output)
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return (change(output[0]), *output[1:])
    raise AttachError(
        f"an edited module returned a {type(output).__name__}. Edit one that returns a tensor, or a tuple that starts "
        "with one"
    )


def to_channels_last(x: Tensor, layout: Layout) -> Tensor:
    """Return (..., D), as adapters get it, whatever the layout of the site."""
    return x.movedim(1, -1) if layout == "BCHW" else x


def shaped_like(y: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """Return an adapter's (..., D) output in the shape and the dtype of `x`.

    B·H·W·D and B·N·D hold the same tokens in one order. Under autocast the dtype stays as it is.
    """
    shape = x.movedim(1, -1).shape if layout == "BCHW" else x.shape
    if y.shape != shape:
        if y.ndim < 3 or y.shape[0] != shape[0] or y.shape[-1] != shape[-1]:
            raise AttachError(
                f"an adapter returned shape {tuple(y.shape)}, but its site has the (..., D) shape {tuple(shape)}. "
                "Let the adapter keep batch and width"
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
