"""Read the keys and values of an attention as it attends to them, with norms and rotations, however it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from petune.base.errors import AttachError
from petune.injector.hooks.keys_values import MASKINGS, SDPA_ARGUMENTS
from petune.injector.hooks.torch_attention import MULTI_HEAD, in_steps
from petune.sites.recorder import PRODUCTS
from petune.sites.sums import ADDITIONS


class AttendedKeys(TorchFunctionMode):
    """While active, keeps the keys and values of the first attention that is computed.

    Attributes:
        keys, values: (B, heads, N, D).
        is_masked: True if some tokens are hidden from others.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_masked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.values is not None:
            return func(*args, **kwargs)
        if name == MULTI_HEAD:
            return in_steps(args, kwargs, self.module, self.keep_fused)
        if name == "scaled_dot_product_attention":
            self.keep_fused(dict(zip(SDPA_ARGUMENTS, args, strict=False)) | kwargs)
        elif name in PRODUCTS and len(args) == 2 and all(isinstance(x, Tensor) and x.ndim == 4 for x in args):
            self.keep_product(*args)
        elif self.keys is not None and name in ADDITIONS | MASKINGS:
            self.is_masked |= name in MASKINGS or any(_hides(x) for x in args if isinstance(x, Tensor))
        return func(*args, **kwargs)

    def keep_fused(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Keep the keys and values of fused attention; return its arguments as they are."""
        self.keys, self.values = arguments["key"], arguments["value"]
        mask = arguments.get("attn_mask")
        self.is_masked = bool(arguments.get("is_causal")) or (mask is not None and _hides(mask))
        return arguments

    def keep_product(self, x: Tensor, y: Tensor) -> None:
        """Keep the keys of q · kᵀ, or the values of the weights and v."""
        if self.keys is not None and x.shape[-1] == self.keys.shape[-2] == y.shape[-2]:
            self.values = y
        elif x.shape[-1] == y.shape[-2]:
            self.keys = y.mT

    def pair(self, num_images: int) -> list[Tensor]:
        """Return keys and values.

        Raises:
            AttachError: None were seen, they are of windows, or masked.
        """
        name = type(self.module).__name__
        if self.keys is None or self.values is None or self.keys.ndim != 4 or len(self.keys) != num_images:
            raise AttachError(
                f"{name} does not attend to keys and values of whole images, (B, heads, N, D), in a way that petune "
                "knows. Read what enters its block instead"
            )
        if self.is_masked:
            raise AttachError(
                f"{name} hides some tokens from others by a mask, which further queries would not know. Read what "
                "enters its block instead"
            )
        return [self.keys, self.values]


def _hides(mask: Tensor) -> bool:
    """Return True for a mask that hides tokens, and not only adds a bias."""
    if mask.dtype == torch.bool:
        return True
    return not mask.is_meta and not torch.compiler.is_compiling() and bool(torch.isneginf(mask).any())
