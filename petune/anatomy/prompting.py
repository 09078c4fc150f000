"""Where prompts go in each block, and the proof that they falsify nothing there, from one forward seen beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from petune.anatomy.forward import dtype_of, undisturbed
from petune.anatomy.positions import Room, refused
from petune.anatomy.proof import HiddenPrompts, same
from petune.anatomy.trace import tensors_in
from petune.sites import Block, Sites


@dataclass
class Seen:
    """One call of a block: what it was given and what it returned, and how many tokens its attention saw."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: int
    output: Any = None


class Prompting:
    """What `Edit.prompt` needs to know of the model as it is without the prompts.

    Args:
        model: As it is; nothing is run before it is asked.
        sites: Its sites.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.model, self.sites = model, sites
        self._seen: dict[int, Seen] = {}
        self._plain: Tensor | None = None

    def room(self, block: Block, count: int) -> Room:
        """Room for `count` prompts: behind the prefix tokens, or at the start of every window."""
        if not self._seen:
            self._plain = self._look()
        index = 0 if block.num_windows > 1 else self.sites.num_prefix_tokens
        return Room(index, count, self._seen[id(block.enter)].tokens)

    def prove(self, run: tuple[Block, ...], room: Room) -> None:
        """Compare the blocks with hidden prompts to what they were without; not on the meta device.

        Raises:
            AttachError: They differ, or do not run.
        """
        seen, block = self._seen[id(run[0].enter)], run[0]
        if next(self.model.parameters()).is_meta:
            return
        try:
            with undisturbed(self.model), torch.no_grad(), HiddenPrompts(room) as hidden:
                output = block.enter(*seen.args, **seen.kwargs) if len(run) == 1 else self.model(self._picture())
        except Exception as error:
            raise refused(block, self.sites, f"does not run with them ({type(error).__name__}: {error})") from error
        before = seen.output if len(run) == 1 else self._plain
        if not hidden.count or not same(next(tensors_in(before)), next(tensors_in(output))):
            why = "knows the places of its tokens in a way that petune cannot tell about tokens without a place"
            raise refused(block, self.sites, why)
        if run[-1] is self.sites.blocks[-1]:
            self._seen = {}  # activations are not kept longer than needed

    def _look(self) -> Any:
        handles = [h for block in self.sites.blocks for h in self._watch(block)]
        try:
            with undisturbed(self.model), torch.no_grad():
                return self.model(self._picture())
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, block: Block) -> list[Any]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            tokens = next(tensors_in((args, kwargs))).shape[1]
            self._seen[id(module)] = Seen(args, kwargs, tokens)

        def attend(module: nn.Module, args: Any, kwargs: Any) -> None:
            if block.num_windows > 1:
                self._seen[id(block.enter)].tokens = next(tensors_in((args, kwargs))).shape[1]

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._seen[id(block.enter)].output = output

        inner = block.enter if block.attn is None else block.attn.enter
        return [
            block.enter.register_forward_pre_hook(enter, with_kwargs=True),
            inner.register_forward_pre_hook(attend, with_kwargs=True),
            block.exit.register_forward_hook(leave),
        ]

    def _picture(self) -> Tensor:
        x = torch.randn(1, *self.sites.input_size, generator=torch.Generator().manual_seed(0), device="cpu")
        return x.to(next(self.model.parameters()).device, dtype_of(self.model))
