"""Adapters that read in one block and add in another, under gradient checkpointing.

Checkpointing runs a block again in the backward pass, without the blocks before it. The block in which the adapter adds
then finds nothing that it read elsewhere. Here these inputs are kept from the forward until its backward is done.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from petune.injector.hooks.base import Args, Kwargs, in_backward, tensor_of, version_of
from petune.injector.hooks.reading import Gather
from petune.sites.site import Site
from petune.sites.sites import Sites

ADVICE = "Use gradient checkpointing with use_reentrant=False"


class Spanning(Gather):
    """Adds `adapter([input of each of ENTERS])` to the output of EXIT, where these are in several blocks.

    Args:
        adapter: Maps a list of tensors, or a single tensor.
        enters, exit, leaving: See `Reader`.
        single: True for an adapter that maps a single tensor.
    """

    def __init__(self, adapter: nn.Module, enters: Sequence[Site], exit: Site, *, leaving: bool, single: bool) -> None:
        super().__init__(adapter, enters, exit, leaving=leaving)
        self.single = single
        self.records = ForwardRecords()

    def enter_first(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Start a new list of inputs, but not in a repetition; pre-hook of the first of ENTERS."""
        if not in_backward():
            super().enter_first(module, args, kwargs)

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Keep the input, but not in a repetition; pre-hook of ENTERS.

        Raises:
            RuntimeError: The repetition is of the reentrant kind, in which the forward has kept nothing.
        """
        if not in_backward():
            super().enter(module, args, kwargs)
        elif self.acts_at(module):
            refuse_reentrant(module)

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Add to the output, in a repetition from what its forward has kept; hook of EXIT."""
        exit_input = next((x for x in args if isinstance(x, Tensor)), None)
        if self.acts_at(module) and output is not None and in_backward():
            self.entered = self.records.inputs_of(exit_input)
            self.versions = [version_of(x) for x in self.entered]
        inputs = self.entered
        result = super().leave(module, args, output)
        if result is not None and may_be_repeated():
            self.records.keep([tensor_of(result)], inputs, exit_input)
        return result

    def changed(self, inputs: list[Tensor]) -> Tensor:
        """Return the adapter's output."""
        return self.run(inputs[0] if self.single else inputs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "records": ForwardRecords()}


class ForwardRecords:
    """Records of the inputs that an adapter read, for blocks that may run again in the backward pass."""

    def __init__(self) -> None:
        self.records: list[weakref.ref[ForwardRecord]] = []

    def keep(self, outputs: Sequence[Tensor], inputs: list[Tensor], exit_input: Tensor | None) -> None:
        """Let the autograd graph of a forward own what was read in it.

        Args:
            outputs: Made from `inputs`.
            inputs: What was read.
            exit_input: What entered the module at which `outputs` were made.
        """
        record = ForwardRecord(inputs, exit_input)
        for output in outputs:
            if output.grad_fn is not None:
                metadata: Any = output.grad_fn.metadata
                metadata[record] = True
        self.records = [reference for reference in self.records if reference() is not None]
        self.records.append(weakref.ref(record))

    def inputs_of(self, exit_input: Tensor | None) -> list[Tensor]:
        """Return what was read in the forward that is repeated: in the only one, or the one with this input of EXIT.

        Raises:
            RuntimeError: It is not known.
        """
        pending = [reference() for reference in self.records]
        records = [record for record in pending if record is not None and record.inputs]
        found = [record for record in records if record.exit_input is exit_input and exit_input is not None]
        if not found and len(records) > 1:
            found = [record for record in records if _equal(record.exit_input, exit_input)]
            if found and all(map(found[0].read_the_same, found)):
                found = found[:1]
        found = found or records
        if len(found) != 1:
            count = "none" if not found else f"{len(found)} that could be meant"
            raise RuntimeError(
                "a block is repeated in a backward pass, and an adapter in it needs what it read in other blocks in "
                f"the forward, but there is {count}. {ADVICE}, and do each backward before the next forward"
            )
        found[0].drop_after_backward()
        return list(found[0].inputs)


class ForwardRecord:
    """Inputs that an adapter read in one forward.

    Attributes:
        inputs: The inputs of ENTERS; empty when the backward is done.
        exit_input: The input of EXIT, which tells forwards apart.
    """

    def __init__(self, inputs: list[Tensor], exit_input: Tensor | None) -> None:
        self.inputs = inputs
        self.exit_input = exit_input

    def read_the_same(self, other: ForwardRecord) -> bool:
        """Return whether the inputs have the same values."""
        return all(_equal(x, y) for x, y in zip(self.inputs, other.inputs, strict=True))

    def drop_after_backward(self) -> None:
        """Free the tensors at the end of this backward pass, unless the graph is retained."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            Variable._execution_engine.queue_callback(self._drop)

    def _drop(self) -> None:
        self.inputs = []
        self.exit_input = None


def spans_blocks(sites: Sites, reads: Sequence[nn.Module], exit: Site, *, leaving: bool) -> bool:
    """Return whether a repetition of a part of the model can pass `exit` without all modules that are read.

    It can if they are in several blocks, or if the block itself is entered and left inside: transformers repeats a
    layer without its hooks.
    """
    roots = {id(module) for block in sites.blocks for module in block.modules}
    number_of = {id(m): block.index for block in sites.blocks for root in block.modules for m in root.modules()}
    touched = {number_of.get(id(module)) for module in (*reads, exit.exit)}
    into_block = not leaving and any(id(module) in roots for module in reads) and id(exit.exit) not in roots
    return len(touched) > 1 or into_block


def _equal(x: Tensor | None, y: Tensor | None) -> bool:
    return x is not None and y is not None and x.shape == y.shape and torch.equal(x, y)


def refuse_reentrant(module: nn.Module) -> None:
    """Check that a repetition is of the kind in which the forward has kept what was read.

    Raises:
        RuntimeError: It is reentrant.
    """
    if not _saving_is_hooked():
        raise RuntimeError(
            f"an adapter reads at {type(module).__name__} for another block, which reentrant gradient checkpointing "
            f"cuts off from the gradient. {ADVICE}"
        )


def may_be_repeated() -> bool:
    """Return True in a forward of which checkpointing may repeat parts."""
    return not in_backward() and not torch.compiler.is_compiling() and _saving_is_hooked()


def _saving_is_hooked() -> bool:
    """Return True if something, such as checkpointing, decides what autograd keeps."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None
