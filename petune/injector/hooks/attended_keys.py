"""Read the keys and values of an attention as it attends to them, with norms and rotations, however it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from petune.base.errors import AttachError
from petune.injector.hooks.keys_values import MASKINGS
from petune.injector.hooks.torch_attention import in_steps
from petune.sites.operations import MULTI_HEAD, PRODUCTS, SDPA, SDPA_ARGUMENTS
from petune.sites.sums import ADDITIONS, DIFFERENCES, MIXES, MULTIPLICATIONS, PRODUCTS_ADDED

CHOICES = MASKINGS | {"where", "__setitem__", "index_fill", "index_fill_", "tril", "triu"}
SUMS = ADDITIONS | DIFFERENCES | PRODUCTS_ADDED | MIXES | {"index_add", "index_add_"}
FACTORS = MULTIPLICATIONS | {"div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__", "__rtruediv__"}
MIXTURES = {"linear", "conv2d"}
BENDS = {
    "clamp", "clamp_min", "clamp_max", "clip", "hardtanh", "tanh", "relu", "relu6", "leaky_relu", "sigmoid", "softplus",
    "softsign", "elu", "gelu", "silu", "abs", "square", "sqrt", "pow", "__pow__", "log", "log1p", "sign", "round",
    "minimum", "maximum", "nan_to_num", "threshold", "hardshrink", "softshrink", "sort", "flip", "roll",
}  # fmt: skip
"""Operations that give each logit another order or distance to the others."""
MASKED = "hides some tokens from others by a mask"
BIASED = "changes q · k, or the weights after the softmax, in a way of its own, such as a bias of positions"


class AttendedKeys(TorchFunctionMode):
    """While active, keeps the keys and values of the first attention that is computed.

    Attributes:
        keys, values: (B, heads, N, D).
        obstacle: What else decides which keys a token attends to, which further queries would not know; or "".
    """

    def __init__(self, module: nn.Module, head_dim: int) -> None:
        super().__init__()
        self.module = module
        self.head_dim = head_dim
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.obstacle = ""
        self.weights: list[Tensor] = []
        """q · k, and what is made of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.values is not None:
            return func(*args, **kwargs)
        if name == MULTI_HEAD:
            return in_steps(args, kwargs, self.module, self.keep_fused)
        if name == SDPA:
            self.keep_fused(dict(zip(SDPA_ARGUMENTS, args, strict=False)) | kwargs)
        elif name in PRODUCTS and len(args) == 2 and all(isinstance(x, Tensor) and x.ndim == 4 for x in args):
            self.keep_product(*args)
        result = func(*args, **kwargs)
        if self.keys is not None and self.values is None and not torch.compiler.is_compiling():
            self.note_bend(name, args, result)
            self.follow(name, [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)], result)
        return result

    def keep_fused(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Keep the keys and values of fused attention; return its arguments as they are."""
        self.keys, self.values = arguments["key"], arguments["value"]
        mask = arguments.get("attn_mask")
        if arguments.get("is_causal") or (mask is not None and _hides(mask)):
            self.obstacle = MASKED
        elif mask is not None and _acts(mask):
            self.obstacle = BIASED
        return arguments

    def follow(self, name: str, operands: list[Tensor], result: Any) -> None:
        """Note an operation on q · k, between the two products, that a softmax alone does not have."""
        others = [x for x in operands if not any(x is y for y in self.weights)]
        is_product = name in PRODUCTS and not self.weights
        if not is_product and len(others) == len(operands):
            return
        self.weights += [result] if isinstance(result, Tensor) else []
        if is_product or self.obstacle:
            return
        over_keys = [x for x in operands if x.shape[-1:] != (1,)]  # one number for all keys of a query changes nothing
        added = [x for x in over_keys if any(x is y for y in others)]
        adds = name in SUMS and (any(_acts(x) for x in added) or len(over_keys) > len(added) + 1)
        if name in CHOICES or (adds and any(_hides(x) for x in others)):
            self.obstacle = MASKED
        elif adds or name in MIXTURES or (name in FACTORS and _weighs_keys(operands, others)):
            self.obstacle = BIASED

    def note_bend(self, name: str, args: Any, result: Any) -> None:
        """Note an operation that bends q · k; a clamp that leaves all values as they are does not."""
        is_weight = bool(args) and any(args[0] is y for y in self.weights)
        in_place = name.rstrip("_") in BENDS and result is args[0] if is_weight else False
        if is_weight and (in_place or (name in BENDS and _differ(result, args[0]))):
            self.obstacle = self.obstacle or BIASED

    def keep_product(self, x: Tensor, y: Tensor) -> None:
        """Keep the keys of q · kᵀ, or the values of the weights and v."""
        if self.keys is not None and x.shape[-1] == self.keys.shape[-2] == y.shape[-2]:
            self.values = y
        elif x.shape[-1] == y.shape[-2]:
            self.keys = y.mT

    def pair(self, num_images: int) -> list[Tensor]:
        """Return keys and values.

        Raises:
            AttachError: None were seen, they are of windows or channels, masked, or weighed by their positions.
        """
        name = type(self.module).__name__
        keys, values = self.keys, self.values
        fits = keys is not None and keys.ndim == 4 and (len(keys), keys.shape[-1]) == (num_images, self.head_dim)
        if keys is None or values is None or not fits:
            raise AttachError(
                f"{name} does not attend to keys and values of whole images, (B, heads, N, D), in a way that petune "
                "knows. Read what enters its block instead"
            )
        if self.obstacle:
            raise AttachError(
                f"{name} {self.obstacle}, which further queries would not know. Read what enters its block instead"
            )
        return [keys, values]


def _hides(mask: Tensor) -> bool:
    """Return True for a mask that hides tokens, and not only adds a bias."""
    if mask.dtype == torch.bool:
        return True
    return not mask.is_meta and not torch.compiler.is_compiling() and bool(torch.isneginf(mask).any())


def _acts(bias: Tensor) -> bool:
    """Return True for a bias that is not all zeros."""
    return not bias.is_meta and not torch.compiler.is_compiling() and bool(bias.any())


def _weighs_keys(operands: list[Tensor], others: list[Tensor]) -> bool:
    """Return True for factors that are not the same for all keys of a query, or q · k times itself."""
    return (len(operands) > 1 and not others) or any(
        x.ndim > 0 and x.shape[-1] > 1 and _differ(x, x[..., :1]) for x in others
    )


def _differ(x: Tensor, y: Tensor) -> bool:
    """Return True if some values differ; tensors without values are taken to."""
    return x.is_meta or not torch.equal(x, y.expand_as(x))
