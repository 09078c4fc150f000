"""What an edit leaves in a model: adapters beside their sites, and hooks that are their own bound methods.

A holder is a named submodule that owns one adapter. Its hooks are bound methods, so a deep copy or a pickle of
the model binds them to its own adapters. Between two hooks a tensor is kept on the holder, never elsewhere.
Shapes: B batch, N tokens, D width, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petune.injector.hooks.position_bias import Room, padded
from petune.sites.site import Layout, Site

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Holder(nn.Module):
    """Base: one adapter beside its site. With `enabled` False the model runs as if nothing were attached."""

    is_petune_holder = True

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter
        self.enabled = True

    def forget(self) -> None:
        """Drop whatever is kept between two hooks."""


class Parallel(Holder):
    """Adds `adapter(what enters ENTER)` to what leaves EXIT."""

    def __init__(self, adapter: nn.Module, enter_layout: Layout, exit_layout: Layout) -> None:
        super().__init__(adapter)
        self.enter_layout, self.exit_layout = enter_layout, exit_layout
        self.kept: Tensor | None = None

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Pre-hook of ENTER: keep what enters."""
        if self.enabled:
            self.kept = first_tensor(args, kwargs)

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Hook of EXIT, called after an exception too (then `output` is None): nothing stays behind."""
        x, self.kept = self.kept, None
        if output is None or not self.enabled:
            return None
        if x is None:
            raise RuntimeError(
                f"an adapter adds what enters one module to what leaves {type(module).__name__}, but nothing had "
                "entered. Both must be called in this order, and in the same segment of gradient checkpointing"
            )
        change = self.adapter(to_channels_last(x, self.enter_layout))
        return with_tensor(output, lambda y: y + shaped_like(change, y, self.exit_layout))

    def forget(self) -> None:
        self.kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}  # a copy of a model must not carry an activation


class Gather(Holder):
    """Adds `adapter(what enters each of ENTERS)` to what leaves EXIT."""

    def __init__(self, adapter: nn.Module, enter_layouts: tuple[Layout, ...], exit_layout: Layout) -> None:
        super().__init__(adapter)
        self.enter_layouts, self.exit_layout = enter_layouts, exit_layout
        self.kept: list[Tensor] = []

    def begin(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Pre-hook of the first of ENTERS: what a forward left behind that did not reach EXIT is dropped."""
        self.kept = []
        self.enter(module, args, kwargs)

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Pre-hook of the others of ENTERS, which are entered in their order."""
        if self.enabled:
            self.kept.append(first_tensor(args, kwargs))

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Hook of EXIT, called after an exception too (then `output` is None): nothing stays behind."""
        xs, self.kept = self.kept, []
        if output is None or not self.enabled:
            return None
        if len(xs) != len(self.enter_layouts):
            raise RuntimeError(
                f"an adapter reads {len(self.enter_layouts)} places in one forward, but {len(xs)} were passed before "
                f"{type(module).__name__} was left. All must be called once, in the same segment of checkpointing"
            )
        change = self.adapter([to_channels_last(x, at) for x, at in zip(xs, self.enter_layouts, strict=True)])
        return with_tensor(output, lambda y: y + shaped_like(change, y, self.exit_layout))

    def forget(self) -> None:
        self.kept = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": []}


class Before(Holder):
    """Replaces what enters a module by `adapter(it)`."""

    def __init__(self, adapter: nn.Module, layout: Layout) -> None:
        super().__init__(adapter)
        self.layout = layout

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Pre-hook of the site."""
        if not self.enabled:
            return None
        x = first_tensor(args, kwargs)
        y = shaped_like(self.adapter(to_channels_last(x, self.layout)), x, self.layout)
        return with_first_tensor(args, kwargs, y)


class After(Holder):
    """Replaces what leaves a module by `adapter(it)`."""

    def __init__(self, adapter: nn.Module, layout: Layout) -> None:
        super().__init__(adapter)
        self.layout = layout

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Hook of the site."""
        if not self.enabled:
            return None
        return with_tensor(output, self._changed)

    def _changed(self, x: Tensor) -> Tensor:
        return shaped_like(self.adapter(to_channels_last(x, self.layout)), x, self.layout)


class Prompts(Holder):
    """Puts tokens behind the prefix when the first of its blocks is entered, cuts them out after the last.

    Attributes:
        room: Where the prompts are.
        fills: What fills their rows in further arguments of a block; see `petune.anatomy.positions.fills`.
    """

    def __init__(self, adapter: nn.Module, room: Room, fills: Mapping[int | str, float]) -> None:
        super().__init__(adapter)
        self.num_prompts, self.index = room.count, room.index
        self.room, self.fills = room, fills

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Pre-hook of the first block."""
        if not self.enabled:
            return None
        x_BND = first_tensor(args, kwargs)
        args, kwargs = with_first_tensor(args, kwargs, self.with_prompts(x_BND, self.adapter(x_BND)))
        return self.padded_with(args, kwargs, self.fills)

    def pass_through(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Pre-hook of the blocks between: what the model tells them is sized for its own tokens."""
        return self.padded_with(args, kwargs, self.fills) if self.enabled else None

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Hook of the last block."""
        return with_tensor(output, self.cut) if self.enabled else None

    def with_prompts(self, x_BND: Tensor, prompts: Tensor) -> Tensor:
        """(B, N, D) to (B, N + P, D)."""
        if prompts.shape[-2] != self.num_prompts:
            raise RuntimeError(
                f"a prompt adapter must return num_prompts = {self.num_prompts} tokens, but it returned "
                f"{prompts.shape[-2]}"
            )
        if x_BND.ndim == 4:  # windows have a dimension of their own (NesT)
            prompts = prompts.unsqueeze(1)
        prompts_BPD = prompts.to(x_BND.dtype).expand(*x_BND.shape[:-2], -1, -1)
        return torch.cat([x_BND[..., : self.index, :], prompts_BPD, x_BND[..., self.index :, :]], dim=-2)

    def padded_with(self, args: Args, kwargs: Kwargs, fills: Mapping[int | str, float]) -> tuple[Args, Kwargs]:
        """What a module is given beside the tokens, with room for prompts."""
        more = tuple(padded(a, self.room, fills.get(i)) for i, a in enumerate(args) if i)
        return (*args[:1], *more), {k: padded(v, self.room, fills.get(k)) for k, v in kwargs.items()}

    def cut(self, x_BND: Tensor) -> Tensor:
        """(B, N + P, D) to (B, N, D)."""
        return torch.cat([x_BND[..., : self.index, :], x_BND[..., self.index + self.num_prompts :, :]], dim=-2)


class InnerPrompts(Prompts):
    """Puts the same tokens into every window of every image where an attention is entered, cuts them out behind it.

    A batch of windows is not mixed: each gets the prompts, and loses what became of them. Without windows it computes
    what a block does with prompts of its own, since those matter to the block's other tokens in its attention alone.
    """

    def __init__(self, adapter: nn.Module, room: Room, fills: Mapping[int | str, float], norm: Site | None) -> None:
        super().__init__(adapter, room, fills)
        self.norm = None if norm is None else (norm.enter, norm.layout)  # in a tuple: the block's own, not a submodule

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Pre-hook of the attention, whose input was normalised where its block does that first."""
        if not self.enabled:
            return None
        x_BND = first_tensor(args, kwargs)
        x_BND = self.with_prompts(x_BND, self._normed(self.adapter(x_BND).to(x_BND.dtype)))
        return self.padded_with(*with_first_tensor(args, kwargs, x_BND), self.fills)

    def _normed(self, prompts_BPD: Tensor) -> Tensor:
        if self.norm is None:
            return prompts_BPD
        norm, layout = self.norm
        normed: Tensor
        if layout == "BCHW":  # (B, P, D) as an image of P rows and one column
            normed = norm(prompts_BPD.movedim(-1, 1).unsqueeze(-1)).squeeze(-1).movedim(1, -1)
        else:
            normed = norm(prompts_BPD)
        return normed


def first_tensor(args: Args, kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor a module is called with: its first positional or, without one, keyword argument."""
    for value in (*args[:1], *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise RuntimeError("an edited module must be called with a tensor, but it was called without one")


def with_first_tensor(args: Args, kwargs: Kwargs, x: Tensor) -> tuple[Args, Kwargs]:
    """The same arguments with `x` for the first tensor, wherever it stands (torch's attention gets it three times)."""
    old = first_tensor(args, kwargs)
    return tuple(x if a is old else a for a in args), {k: x if v is old else v for k, v in kwargs.items()}


def with_tensor(output: Any, change: Any) -> Any:
    """`output` with its tensor changed; of a tuple, the first item."""
    if isinstance(output, Tensor):
        return change(output)
    if type(output) is tuple and output and isinstance(output[0], Tensor):
        return (change(output[0]), *output[1:])
    raise RuntimeError(
        f"an edited module must return a tensor, or a tuple that starts with one, but it returned a "
        f"{type(output).__name__}"
    )


def to_channels_last(x: Tensor, layout: Layout) -> Tensor:
    """What an adapter gets to see: (..., D), whatever the layout of the site."""
    return x.movedim(1, -1) if layout == "BCHW" else x


def shaped_like(y: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """An adapter's (..., D) output in the shape of `x`: B·H·W·D and B·N·D hold the same tokens in the same order."""
    rows = x.movedim(1, -1).shape if layout == "BCHW" else x.shape
    if y.shape != rows:
        if y.ndim < 3 or y.shape[0] != rows[0] or y.shape[-1] != rows[-1]:
            raise RuntimeError(
                f"an adapter's output must fit the site's (..., D) shape {tuple(rows)}, but has shape {tuple(y.shape)}"
            )
        y = y.reshape(rows)
    return y.movedim(-1, 1) if layout == "BCHW" else y


def once(switch: Callable[[bool], None], *, on: bool) -> Callable[[bool], None]:
    """A switch that is `on` at first, and does nothing where it is so already: what is off may be detached too."""
    now = on

    def told(on: bool) -> None:
        nonlocal now
        if on != now:
            switch(on)
            now = on

    return told
