"""Holders that insert prompts, extra tokens, into a block or only into its attention, and cut them out again.

Shapes: B batch, N tokens, D width, P prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petune.injector.hooks.base import Args, Holder, Kwargs, first_tensor, with_first_tensor, with_tensor
from petune.injector.hooks.position_bias import pad_argument
from petune.injector.hooks.prompt_slot import PromptSlot
from petune.sites.site import Site


class Prompts(Holder):
    """Inserts tokens behind the prefix where the first of its blocks is entered, and cuts them out after the last.

    Attributes:
        slot: Where the prompts are among the tokens.
        padding: Values for the prompts' rows in further arguments of a block; see `position_bias.padding_values`.
    """

    def __init__(self, adapter: nn.Module, slot: PromptSlot, padding: Mapping[int | str, float]) -> None:
        super().__init__(adapter)
        self.slot = slot
        self.padding = padding

    @property
    def num_prompts(self) -> int:
        """P."""
        return self.slot.num_prompts

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Insert the prompts; pre-hook of the first block."""
        if not self.enabled:
            return None
        x_BND = first_tensor(args, kwargs)
        return self._padded(*with_first_tensor(args, kwargs, self._with_prompts(x_BND, self.adapter(x_BND))))

    def pass_through(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Pad the arguments that come with the tokens; pre-hook of the blocks after the first."""
        return self._padded(args, kwargs) if self.enabled else None

    def leave(self, module: nn.Module, args: Args, output: Any) -> Any:
        """Cut the prompts out; hook of the last block."""
        return with_tensor(output, self._without_prompts) if self.enabled else None

    def _with_prompts(self, x_BND: Tensor, prompts: Tensor) -> Tensor:
        """Return (B, N + P, D)."""
        if prompts.shape[-2] != self.num_prompts:
            raise RuntimeError(
                f"the prompt adapter returned {prompts.shape[-2]} tokens, but its num_prompts is {self.num_prompts}. "
                "Both must be the same"
            )
        if x_BND.ndim == 4:  # windows have a dimension of their own (NesT)
            prompts = prompts.unsqueeze(1)
        prompts_BPD = prompts.to(x_BND.dtype).expand(*x_BND.shape[:-2], -1, -1)
        index = self.slot.index
        return torch.cat([x_BND[..., :index, :], prompts_BPD, x_BND[..., index:, :]], dim=-2)

    def _without_prompts(self, x_BND: Tensor) -> Tensor:
        """(B, N + P, D) to (B, N, D)."""
        start, stop = self.slot.index, self.slot.index + self.num_prompts
        return torch.cat([x_BND[..., :start, :], x_BND[..., stop:, :]], dim=-2)

    def _padded(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Return the arguments with rows for the prompts in all but the first."""
        further = (pad_argument(a, self.slot, self.padding.get(i)) for i, a in enumerate(args) if i)
        padded = {name: pad_argument(value, self.slot, self.padding.get(name)) for name, value in kwargs.items()}
        return (*args[:1], *further), padded


class AttentionPrompts(Prompts):
    """Inserts the same tokens into every window of every image where an attention is entered, cuts them out after it.

    Images of a batch do not mix: each window gets its own copy of the prompts, and their outputs are dropped. This
    equals prompts that a block has for itself, because those affect the block's other tokens in its attention only.
    """

    def __init__(
        self, adapter: nn.Module, slot: PromptSlot, padding: Mapping[int | str, float], norm: Site | None
    ) -> None:
        super().__init__(adapter, slot, padding)
        # a tuple hides the block's own norm from the holder's submodules
        self.norm = None if norm is None else (norm.enter, norm.layout)

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """Insert the prompts; pre-hook of the attention, whose input is normalized if its block does that first."""
        if not self.enabled:
            return None
        x_BND = first_tensor(args, kwargs)
        prompts_BPD = self._normalized(self.adapter(x_BND).to(x_BND.dtype))
        return self._padded(*with_first_tensor(args, kwargs, self._with_prompts(x_BND, prompts_BPD)))

    def _normalized(self, prompts_BPD: Tensor) -> Tensor:
        if self.norm is None:
            return prompts_BPD
        norm, layout = self.norm
        if layout == "BCHW":
            image_BDP1 = prompts_BPD.movedim(-1, 1).unsqueeze(-1)  # an image of P rows and one column
            normalized: Tensor = norm(image_BDP1).squeeze(-1).movedim(1, -1)
        else:
            normalized = norm(prompts_BPD)
        return normalized
