"""A holder of a side network, which carries a state of its own from site to site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.injector.hooks.attended_keys import AttendedKeys
from petune.injector.hooks.base import (
    SKIPPED,
    Args,
    Holder,
    Kwargs,
    first_tensor,
    in_backward,
    in_dtype_of,
    is_failure,
    phase_of,
    shaped_like,
    tensor_of,
    to_channels_last,
    with_tensor,
)
from petune.injector.hooks.replaced_forward import ReplacedForward
from petune.injector.hooks.spanning import ForwardRecords, may_be_repeated, refuse_reentrant
from petune.sites.site import Layout


class Side(Holder):
    """Calls one cell at every site: it maps the state and what it reads there to the next state and a change.

    Attributes:
        layouts: Of the sites.
        reads_output: True if the cell reads what leaves them.
        state: What the cell returned at the last site; None before the first one.
        next_index: The site that comes next.
        last_shape: Of what the cell read at the last site.
        records: For each site, the states that a repetition of its block needs.
    """

    def __init__(self, adapter: nn.Module, layouts: tuple[Layout, ...], *, reads_output: bool) -> None:
        super().__init__(adapter)
        self.layouts = layouts
        self.reads_output = reads_output
        self.state: Tensor | None = None
        self.next_index = 0
        self.last_shape: torch.Size | None = None
        self.records = [ForwardRecords() for _ in layouts]

    def snapshot(self) -> tuple[Tensor | None, int]:
        return self.state, self.next_index

    def restore(self, snapshot: tuple[Tensor | None, int]) -> None:
        self.state, self.next_index = snapshot

    def clear(self) -> None:
        super().clear()
        self.state, self.next_index = None, 0

    def __getstate__(self) -> dict[str, Any]:
        records = [ForwardRecords() for _ in self.layouts]
        return {**super().__getstate__(), "state": None, "next_index": 0, "records": records}


class SideStep:
    """The hooks at one site.

    Args:
        holder: The side network.
        index: Position of the site.

    Attributes:
        replaced: The forward of an attention whose keys and values the cell reads.
        head_dim: Width of a head of its keys.
    """

    def __init__(self, holder: Side, index: int) -> None:
        self.holder = holder
        self.index = index
        self.entered: Tensor | list[Tensor] | None = None
        self.replaced: ReplacedForward | None = None
        self.head_dim = 0

    def read_attention(self, attention: nn.Module, head_dim: int) -> ReplacedForward:
        """Let the cell read keys and values; return what undoes that."""
        self.head_dim = head_dim
        self.replaced = ReplacedForward(attention, self.attend)
        return self.replaced

    def attend(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the attention's own forward, and keep its keys and values."""
        assert self.replaced is not None
        attention = self.replaced.module
        if not self.holder.acts_at(attention):
            return original(*args, **kwargs)
        seen = AttendedKeys(attention, self.head_dim)
        with seen:
            output = original(*args, **kwargs)
        self.entered = seen.pair(len(first_tensor(args, kwargs)))
        return output

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Keep the input; pre-hook of a site where the cell reads what enters."""
        if self.holder.acts_at(module):
            self.entered = first_tensor(args, kwargs)

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Call the cell, and add its change to the output; hook, also called after an exception."""
        if phase_of(module) == SKIPPED:
            return None
        entered, self.entered = self.entered, None
        holder, index = self.holder, self.index
        if output is None or not holder.acts_at(module):
            return None
        x = entered if isinstance(entered, list) else self._channels_last(output if entered is None else entered)
        exit_input = next((a for a in args if isinstance(a, Tensor)), None)
        before = self._state_before(module, exit_input)
        x = in_dtype_of(holder.adapter, x)
        state, change = self._checked(self._called(before, x, module))
        result = None
        if change is not None:
            result = with_tensor(output, lambda y: y + shaped_like(change, y, holder.layouts[index], holder.adapter))
        if in_backward():
            return result
        if before is not None and may_be_repeated():
            holder.records[index].keep([state] if change is None else [state, change], [before], exit_input)
        is_last = index == len(holder.layouts) - 1
        holder.state, holder.next_index = (None, 0) if is_last else (state, index + 1)
        return result

    def _channels_last(self, given: Any) -> Tensor:
        return to_channels_last(tensor_of(given), self.holder.layouts[self.index])

    def _state_before(self, module: nn.Module, exit_input: Tensor | None) -> Tensor | None:
        holder, index = self.holder, self.index
        if index == 0:
            return None
        if in_backward():
            refuse_reentrant(module)
            return holder.records[index].inputs_of(exit_input)[0]
        if holder.next_index != index:
            raise AttachError(
                f"a side network reads {len(holder.layouts)} sites in one forward, but {type(module).__name__} (number "
                f"{index}) came after number {holder.next_index - 1}. Each must be called once, in their order"
            )
        return holder.state

    def _called(self, before: Tensor | None, x: Tensor | list[Tensor], module: nn.Module) -> Any:
        """Call the cell; if it fails where there are other tokens than at the last site, say so."""
        holder, index = self.holder, self.index
        new = (x[0] if isinstance(x, list) else x).shape
        shape, holder.last_shape = holder.last_shape, new
        try:
            return holder.call(before, x, index)
        except Exception as error:
            if index == 0 or shape is None or shape == new or in_backward() or not is_failure(error):
                raise
            raise AttachError(
                f"the side network {type(holder.adapter).__name__} failed at its site number {index}, in a "
                f"{type(module).__name__}: it reads the shape {tuple(new)} there, and {tuple(shape)} at the site "
                f"before ({type(error).__name__}: {error}). If prompts enter only some of its sites, let them pass "
                "through all, edit.prompt(blocks, …) with all these blocks; otherwise let the cell fit its state to x"
            ) from error

    def _checked(self, made: Any) -> tuple[Tensor, Tensor | None]:
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Tensor):
            state, change = made
            return state, change
        raise AttachError(
            f"the side network {type(self.holder.adapter).__name__} must return (state, change), a tensor and a tensor "
            "or None"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "entered": None}
