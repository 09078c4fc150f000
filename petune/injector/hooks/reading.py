"""Holders that read at one site, or at several, and add at another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.base.text import plural
from petune.injector.hooks.base import (
    INNER,
    Args,
    Holder,
    Kwargs,
    Part,
    first_tensor,
    in_part,
    part_of,
    phase_of,
    shaped_like,
    tensor_of,
    to_channels_last,
    version_of,
    with_tensor,
)
from petune.sites.site import Layout, Site


class Reader(Holder):
    """A holder that keeps what it reads until it adds.

    Args:
        adapter: The adapter.
        enters: Where it reads.
        exit: Where it adds.
        leaving: It reads what leaves these sites.

    Attributes:
        keeps_copy: True if the tensor is replaced after it was read; see `stream.Stream`.
        enter_parts: For each site of which the output is read, the channels that are read.
        part: The channels that it adds to.
    """

    keeps_copy = False

    def __init__(self, adapter: nn.Module, enters: Sequence[Site], exit: Site, *, leaving: bool) -> None:
        super().__init__(adapter)
        self.between = all(site.read_only for site in enters)
        self.reads_output = leaving
        self.enter_layouts: tuple[Layout, ...] = tuple(site.layout for site in enters)
        self.enter_parts: tuple[Part, ...] = tuple(site.part for site in enters)
        self.exit_layout = exit.layout
        self.part = exit.part
        self.versions: list[int] = []
        """How often each tensor that is kept was changed in place before."""

    def refuse_changed(self, inputs: Sequence[Tensor]) -> None:
        """Check that what was read is still the same.

        Raises:
            AttachError: The model has changed it in place.
        """
        if [version_of(x) for x in inputs] != self.versions and not torch.compiler.is_compiling():
            raise AttachError(
                "the model changes tokens in place after an adapter has read them (x += y, or x[:] = y), so the "
                "adapter would compute with other numbers. Let the model compute x = x + y, or use a method that edits "
                "single layers, such as lora"
            )

    def kept(self, x: Tensor) -> Tensor:
        """Return the tensor to keep."""
        return x.clone() if self.keeps_copy else x

    def added(self, output: Any, change: Tensor, layout: Layout) -> Any:
        """Return an output with a change added to its channels, or to a part of them."""

        def add(y: Tensor, layout: Layout) -> Tensor:
            return y + shaped_like(change, y, layout, self.adapter)

        return with_tensor(output, lambda y: in_part(self.part, y, layout, add))

    def reads_at(self, module: nn.Module) -> bool:
        """Return True if the hook that reads a module's input acts now; a stream is read in the model's own call."""
        return self.acts_at(module) and not (self.between and phase_of(module) == INNER)


class Parallel(Reader):
    """Adds `adapter(input of ENTER)`, or of its output, to the output of EXIT."""

    def __init__(self, adapter: nn.Module, enter: Site, exit: Site, *, leaving: bool) -> None:
        super().__init__(adapter, [enter], exit, leaving=leaving)
        self.entered: Tensor | None = None

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Keep the input; pre-hook of ENTER."""
        if self.reads_at(module):
            self.entered = self.kept(first_tensor(args, kwargs))
            self.versions = [version_of(self.entered)]

    def read_output(self, module: nn.Module, args: Args, output: Any) -> None:
        """Keep the output instead; hook of ENTER."""
        if self.acts_at(module):
            self.entered = part_of(tensor_of(output), self.enter_parts[0], self.enter_layouts[0])
            self.versions = [version_of(self.entered)]

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Add to the output; hook of EXIT. Also called after an exception, with `output` None: nothing stays behind."""
        x, self.entered = self.entered, None
        if output is None or not self.acts_at(module):
            return None
        if x is None:
            raise AttachError(
                f"an adapter adds to the output of {type(module).__name__}, but the module whose input it reads was "
                "not called before. Both must be called in this order, in the same segment of gradient checkpointing, "
                "and no adapter around the first of them may leave it out"
            )
        self.refuse_changed([x])
        change = self.run(to_channels_last(x, self.enter_layouts[0]))
        return self.added(output, change, self.exit_layout)

    def snapshot(self) -> tuple[Tensor | None, list[int]]:
        return self.entered, self.versions

    def restore(self, snapshot: tuple[Tensor | None, list[int]]) -> None:
        self.entered, self.versions = snapshot

    def clear(self) -> None:
        super().clear()
        self.entered = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "entered": None}


class Gather(Reader):
    """Adds `adapter([input of each of ENTERS])`, or of their outputs, to the output of EXIT."""

    def __init__(self, adapter: nn.Module, enters: Sequence[Site], exit: Site, *, leaving: bool) -> None:
        super().__init__(adapter, enters, exit, leaving=leaving)
        self.entered: list[Tensor] = []

    def enter_first(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Start a new list of inputs; pre-hook of the first of ENTERS. An earlier forward may not have reached EXIT."""
        if self.reads_at(module):
            self.entered, self.versions = [], []
            self._keep(first_tensor(args, kwargs))

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Keep the input; pre-hook of the others of ENTERS, which are entered in their order."""
        if self.reads_at(module):
            self._keep(first_tensor(args, kwargs))

    def read_output_first(self, module: nn.Module, args: Args, output: Any) -> None:
        """Start a new list with the output of the first of ENTERS; hook."""
        if self.acts_at(module):
            self.enter_first(module, (part_of(tensor_of(output), self.enter_parts[0], self.enter_layouts[0]),), {})

    def read_output(self, module: nn.Module, args: Args, output: Any) -> None:
        """Keep the output of another one of ENTERS; hook."""
        if self.acts_at(module):
            index = min(len(self.entered), len(self.enter_parts) - 1)  # `leave` refuses more
            self.enter(module, (part_of(tensor_of(output), self.enter_parts[index], self.enter_layouts[index]),), {})

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Add to the output; hook of EXIT. Also called after an exception, with `output` None: nothing stays behind."""
        inputs, self.entered = self.entered, []
        if output is None or not self.acts_at(module):
            return None
        if len(inputs) != len(self.enter_layouts):
            raise AttachError(
                f"an adapter reads {plural(len(self.enter_layouts), 'site')} in one forward, but entered {len(inputs)} "
                f"before {type(module).__name__} was left. Each must be called once, in one segment of checkpointing"
            )
        self.refuse_changed(inputs)
        pairs = zip(inputs, self.enter_layouts, strict=True)
        change = self.changed([to_channels_last(x, layout) for x, layout in pairs])
        return self.added(output, change, self.exit_layout)

    def changed(self, inputs: list[Tensor]) -> Tensor:
        """Return the adapter's output."""
        return self.run(inputs)

    def _keep(self, x: Tensor) -> None:
        self.entered.append(self.kept(x))
        self.versions.append(version_of(self.entered[-1]))

    def snapshot(self) -> tuple[list[Tensor], list[int]]:
        return list(self.entered), list(self.versions)

    def restore(self, snapshot: tuple[list[Tensor], list[int]]) -> None:
        entered, versions = snapshot
        self.entered, self.versions = list(entered), list(versions)

    def clear(self) -> None:
        super().clear()
        self.entered = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "entered": []}
