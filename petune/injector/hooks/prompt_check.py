"""Verify that prompts falsify nothing in a block: hidden from every attention, they leave its output as it was."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from petune.injector.hooks.base import version_of, with_tensor
from petune.injector.hooks.hidden_prompts import HiddenPrompts, KeyCounts
from petune.injector.hooks.position_bias import paddings
from petune.injector.hooks.prompt_effect import prompts_have_effect, prompts_have_positions
from petune.injector.hooks.prompt_reasons import BlockCall, numbered_pairs, why_changed, why_unseen, why_without_effect
from petune.injector.hooks.prompt_slot import PromptSlot, enters_attention_only, prompts_refused
from petune.sites.forward import device_of, dtype_of, inference, tensors_in
from petune.sites.hooked import removed_after
from petune.sites.input_spec import Inputs
from petune.sites.logits import logits_of, max_difference, max_value
from petune.sites.site import Block
from petune.sites.sites import Sites

LOG = logging.getLogger(__name__)

NUM_IMAGES = 2
"""Blocks are compared for more than one image, so that prompts of one that reach another are seen."""
MAX_ERROR = 1e-5
"""Relative difference by rounding that is allowed in float32: 1e-6 at most in 11 models. Positions that prompts falsify
make 3e-5 or more even where random weights are so small that a block hardly changes its tokens (a small V-JEPA 2)."""


class PromptCheck:
    """Compares blocks with hidden prompts to the same blocks without prompts.

    Args:
        model: The model without the prompts that are to be checked; one forward of two images is recorded on first use.
        sites: Its sites.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.model = model
        self.sites = sites
        self._calls: dict[nn.Module, BlockCall] = {}
        self._output: Any = None
        self._key_counts: tuple[int, ...] = ()
        self._slots: list[PromptSlot] = []
        self._kinds: set[tuple[type, type]] = set()

    def slot(self, block: Block, num_prompts: int) -> PromptSlot:
        """Return where prompts go: after the prefix tokens of a block, or before all tokens of its attention.

        Raises:
            AttachError: One row of tokens belongs to several images, or the block is given positions as whole numbers.
        """
        if not self._calls:
            self._record()
        call = self._calls[block.enter]
        if call.num_rows == 1:
            raise prompts_refused(block, self.sites, "puts all images of a batch into one row of tokens")
        inside = enters_attention_only(block, self.sites)
        if not inside and not any(isinstance(x, Tensor) for x in (*call.args[:1], *call.kwargs.values())):
            given = type(next(iter(call.args), None)).__name__
            raise prompts_refused(block, self.sites, f"is called with a {given}, not with a tensor of tokens")
        index = 0 if inside else self.sites.num_prefix_tokens
        slot = PromptSlot(index, num_prompts, call.num_tokens)
        numbered = numbered_pairs(call, slot, paddings(block, self.sites))
        if numbered is not None:
            name = f"argument {numbered}" if isinstance(numbered, int) else numbered
            reason = f"is given the relative positions of its tokens as whole numbers ({name}), and prompts have none"
            raise prompts_refused(block, self.sites, reason)
        return slot

    def verify(self, blocks: Sequence[Block], slot: PromptSlot, adapter: nn.Module) -> None:
        """Compare the outputs of blocks with hidden prompts and without prompts; on the meta device only their shapes.

        Args:
            blocks: Those that the prompts pass through; the prompts are in the model already.
            slot: Where the prompts are.
            adapter: Returns the prompts.

        Raises:
            AttachError: The outputs differ, the blocks do not run, none of their attentions saw the prompts, or what
                the prompts contain has no effect.
        """
        block, call = blocks[0], self._calls[blocks[0].enter]
        alone = len(blocks) == 1 and block.is_module

        def forward() -> Any:
            return block.enter(*call.args, **call.kwargs) if alone else self._images().call(self.model)

        if slot not in self._slots:
            self._slots.append(slot)  # earlier blocks' prompts are in the model already: hide them too
        counts = call.key_counts if alone else self._key_counts
        try:
            with inference(self.model):
                output, hidden = self._hidden(forward, counts)
                has_effect = prompts_have_effect(blocks, slot, adapter, forward)
                has_positions = self._have_positions(blocks, slot, adapter, forward)
        except Exception as error:
            reason = f"does not run with them ({type(error).__name__}: {error})"
            raise prompts_refused(block, self.sites, reason) from error
        if not hidden[slot].num_attentions:
            raise prompts_refused(block, self.sites, why_unseen(call, slot, NUM_IMAGES))
        before = call.output if alone else self._output
        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        if not outputs_agree(logits_of(before), logits_of(output), dtypes):
            with inference(self.model):
                numbers = hidden[slot].numbers_tokens
                reason = why_changed(
                    call, before, output, lambda: self._hidden(forward, counts)[0], adapter, numbers_tokens=numbers
                )
            raise prompts_refused(block, self.sites, reason)
        if not has_effect:
            raise prompts_refused(block, self.sites, why_without_effect(call))
        if has_positions:
            reason = "gives each prompt a position among the tokens (relative attention), where prompts have none"
            raise prompts_refused(block, self.sites, reason)
        if block is self.sites.blocks[0] and logits_of(output).is_meta and hidden[slot].numbers_tokens:
            warnings.warn(
                f"{block.path} of {self.sites.model} numbers its tokens. Whether prompts shift these positions is seen "
                "with weights only; if they do, a run refuses the method",
                stacklevel=2,
            )
        if blocks[-1] is self.sites.blocks[-1]:
            self._calls = {}  # activations are not kept longer than needed

    def _hidden(
        self, forward: Callable[[], Any], key_counts: Sequence[int]
    ) -> tuple[Any, dict[PromptSlot, HiddenPrompts]]:
        """Return what a forward returns while no token attends to the prompts, and what hid them."""
        with contextlib.ExitStack() as stack:
            hidden = {known: stack.enter_context(HiddenPrompts(known, key_counts)) for known in self._slots}
            return forward(), hidden

    def _have_positions(
        self, blocks: Sequence[Block], slot: PromptSlot, adapter: nn.Module, forward: Callable[[], Any]
    ) -> bool:
        """Return whether prompts have positions; it is seen in one block of each kind."""
        kind = (type(blocks[0].enter), type(blocks[0].parts.get("attn", blocks[0]).enter))
        if kind in self._kinds:
            return False
        self._kinds.add(kind)
        return prompts_have_positions(blocks, slot, adapter, forward)

    def passes_again(self, blocks: Sequence[Block]) -> bool:
        """Return whether tokens that have left the last of these blocks enter the first one again, in one forward.

        NaNs that replace what the last block returns first are looked for in later inputs of the first block. They are
        not there if a model calls its blocks once for each of several images.
        """
        last_calls = 0
        tainted: list[bool] = []

        def taint(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal last_calls
            last_calls += 1
            return with_tensor(output, lambda y: torch.full_like(y, torch.nan)) if last_calls == 1 else None

        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            if last_calls:
                x = next(tensors_in((args, kwargs)))
                tainted.append(x.is_meta or bool(x.isnan().any()))

        handles: list[Any] = [
            blocks[-1].exit.register_forward_hook(taint),
            blocks[0].enter.register_forward_pre_hook(look, with_kwargs=True),
        ]
        try:
            with removed_after(handles), inference(self.model):
                self._images().call(self.model)
        except Exception:  # code that reads numbers may refuse NaNs
            LOG.debug("the model does not run on NaNs", exc_info=True)
            return bool(tainted)
        return any(tainted)

    def _record(self) -> None:
        counts = KeyCounts()
        handles = [handle for block in self.sites.blocks for handle in self._watch(block, counts)]
        with removed_after(handles), inference(self.model), counts:
            self._output = self._images().call(self.model)
        self._key_counts = self._key_counts or tuple(counts.values)

    def _watch(self, block: Block, counts: KeyCounts) -> list[Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            """Record the call before other hooks change it: calling the block again runs these again."""
            x = next(tensors_in((args, kwargs)))
            num_rows = len(x) if x.ndim > 2 else 1  # (tokens, width), without a batch dimension
            version = version_of(x)
            self._calls[block.enter] = BlockCall(args, kwargs, x.shape[-2], num_rows, version=version)
            started[:] = [len(counts.values), len(counts.attentions)]

        def enter_last(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._calls[block.enter].num_tokens = next(tensors_in((args, kwargs))).shape[-2]

        def enter_attention(module: nn.Module, args: Any, kwargs: Any) -> None:
            if enters_attention_only(block, self.sites):
                self._calls[block.enter].num_tokens = next(tensors_in((args, kwargs))).shape[-2]

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            call = self._calls[block.enter]
            call.output = output
            call.key_counts = tuple(counts.values[started[0] :])
            call.attention_keys = tuple(counts.attentions[started[1] :])
            call.changes_input = version_of(next(tensors_in((call.args, call.kwargs)))) != call.version

        started = [0, 0]
        attention = block.parts.get("attn", block).enter
        return [
            block.enter.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
            block.enter.register_forward_pre_hook(enter_last, with_kwargs=True),
            attention.register_forward_pre_hook(enter_attention, with_kwargs=True),
            block.exit.register_forward_hook(leave),
        ]

    def _images(self) -> Inputs:
        return self.sites.input_spec.noise(NUM_IMAGES).to(device_of(self.model), dtype_of(self.model))


def outputs_agree(x: Tensor, y: Tensor, dtypes: Set[torch.dtype]) -> bool:
    """Return whether two outputs are equal up to rounding; only in shape on the meta device, which has no numbers.

    Args:
        x, y: The outputs.
        dtypes: The model's, which may return more precise numbers than it computes with.
    """
    if x.is_meta:
        return x.shape == y.shape
    scale = max(max_value(x), 1e-6)
    is_exact = torch.get_float32_matmul_precision() == "highest"
    error = MAX_ERROR if is_exact else 10 * MAX_ERROR
    tolerance = error if {x.dtype, *dtypes} <= {torch.float32, torch.float64} else 5e-2
    return x.shape == y.shape and max_difference(x, y) <= tolerance * scale
