"""Give an attention keys and values besides those of its tokens, whichever way it computes.

The module's forward runs as it is, inside a mode that appends rows to k and v where they are used: in fused attention,
in the two products around a softmax, and in torch's own `nn.MultiheadAttention`. Masks, and biases of positions, are
extended: every token attends to the new keys, with a bias of zero.

Shapes: B batch, H heads, N tokens, P new keys, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from petune.base.errors import AttachError
from petune.injector.hooks.base import Holder, first_tensor, in_dtype_of, is_failure, to_channels_last
from petune.injector.hooks.replaced_forward import ReplacedForward
from petune.injector.hooks.torch_attention import in_steps
from petune.sites.operations import MULTI_HEAD, PRODUCTS, SDPA, SDPA_ARGUMENTS
from petune.sites.site import Layout
from petune.sites.sums import ADDITIONS

MASKINGS = {"masked_fill", "masked_fill_"}


class KeysValues(Holder):
    """Appends `adapter(tokens that enter)` to the keys and values of one attention.

    Args:
        adapter: Maps (B, N, D of the block) to keys and values.
        module: The attention; bound methods of this object follow a deep copy of it.
        layout: Of what enters it.
        head_dims: Width of a head of keys, and of values.
    """

    def __init__(self, adapter: nn.Module, module: nn.Module, layout: Layout, head_dims: tuple[int, int]) -> None:
        super().__init__(adapter)
        self.hidden = (module,)  # in a tuple: the attention stays the backbone's own
        self.layout = layout
        self.head_dims = head_dims
        self.replaced: ReplacedForward | None = None

    def put(self) -> None:
        """Replace the attention's forward."""
        self.replaced = ReplacedForward(self.hidden[0], self.attend)

    def remove(self) -> None:
        """Restore it."""
        self.enabled = False
        if self.replaced is not None:
            self.replaced.remove()

    def attend(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the attention's own forward with more keys and values."""
        module = self.hidden[0]
        if not self.acts_at(module):
            return original(*args, **kwargs)
        x_BND = to_channels_last(first_tensor(args, kwargs), self.layout)
        if x_BND.is_nested:
            raise AttachError("keys and values cannot be added to nested tensors. Use images of one size")
        keys, values = self.pair(x_BND)
        appended = Appended(keys, values, self.head_dims, x_BND.shape[1:-1].numel(), module)
        try:
            with appended:
                output = original(*args, **kwargs)
        except RuntimeError as error:
            if not appended.has_keys or appended.done or not is_failure(error):
                raise
            raise AttachError(
                f"{type(module).__name__} takes no further keys and values: its own code reshapes or masks the "
                f"products of q and k for as many keys as tokens, as windows that are shifted do ({error}). Use "
                "another method, such as adaptformer"
            ) from error
        if not appended.done:
            raise AttachError(
                f"{type(module).__name__} did not attend to the keys and values that were added: it computes attention "
                "in a way that petune does not know. Use another method, such as vpt"
            )
        return output

    def pair(self, x_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the adapter's keys and values, each (1 or B, P, heads · D)."""
        made: Any = self.call(in_dtype_of(self.adapter, x_BND))
        dims = self.head_dims
        is_pair = isinstance(made, tuple | list) and len(made) == 2 and all(isinstance(y, Tensor) for y in made)
        fits = is_pair and all(y.ndim == 3 and y.shape[0] in (1, x_BND.shape[0]) for y in made)
        if not fits or not made[0].shape[1] or made[0].shape[1] != made[1].shape[1] or _heads_differ(made, dims):
            shapes = [tuple(y.shape) for y in made] if is_pair else type(made).__name__
            raise AttachError(
                f"the adapter {type(self.adapter).__name__} returned {shapes}. Return as many keys as values, one "
                "or more, each of shape (1 or B, P, heads · width of a head)"
            )
        return made[0], made[1]


class Appended(TorchFunctionMode):
    """While active, the first attention that is computed gets more keys and values.

    Args:
        keys, values: (1 or B, P, H · D).
        head_dims: D of keys and of values.
        num_tokens: N.
        module: The attention.

    Attributes:
        done: True when an attention has used them.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, head_dims: tuple[int, int], num_tokens: int, module: nn.Module
    ) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self.head_dims = head_dims
        self.num_tokens = num_tokens
        self.module = module
        self.num_new = keys.shape[1]
        self.has_keys = False
        self.done = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.done:
            return func(*args, **kwargs)
        if name == SDPA:
            return func(**self.extend_fused(dict(zip(SDPA_ARGUMENTS, args, strict=False)) | kwargs))
        if name == MULTI_HEAD:
            output, weights = in_steps(args, kwargs, self.module, self.extend_fused)
            return output, None if weights is None else weights[..., : -self.num_new]
        if name in PRODUCTS and len(args) == 2:
            args = self.extend_product(*args)
        elif self.has_keys and name in ADDITIONS | MASKINGS:
            args = tuple(self.extend_bias(x, args) for x in args)
        return func(*args, **kwargs)

    def extend_fused(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of fused attention with more keys and values."""
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        mask = arguments.get("attn_mask")
        if arguments.get("is_causal"):
            shape = query.shape[-2], key.shape[-2]
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        self.done = True
        return {
            **arguments,
            "key": self.joined(key, self.keys, self.head_dims[0], -2),
            "value": self.joined(value, self.values, self.head_dims[1], -2),
            "attn_mask": None if mask is None else self.padded(mask),
            "is_causal": False,
        }

    def extend_product(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Return the operands of q · kᵀ, or of the weights and v, with more keys or values; others as they are."""
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.ndim < 3 or x.ndim != y.ndim:
            return x, y
        if self.has_keys and x.shape[-1] == y.shape[-2] + self.num_new:
            self.done = True
            return x, self.joined(y, self.values, self.head_dims[1], -2)
        is_logits = x.shape[-1] == self.head_dims[0] == y.shape[-2] and x.shape[-2] == y.shape[-1] == self.num_tokens
        if is_logits and not self.has_keys:
            self.has_keys = True
            return x, self.joined(y, self.keys, self.head_dims[0], -1)
        return x, y

    def extend_bias(self, x: Any, args: Any) -> Any:
        """Return a bias or mask of pairs of tokens with columns for the new keys; other operands as they are."""
        is_pairs = isinstance(x, Tensor) and x.ndim >= 2 and x.shape[-1] == self.num_tokens
        longer = self.num_tokens + self.num_new
        return self.padded(x) if is_pairs and any(a.shape[-1:] == (longer,) for a in _tensors(args)) else x

    def padded(self, mask: Tensor) -> Tensor:
        """Return a mask with columns for the new keys, which all tokens attend to."""
        if mask.shape[-1] == 1:
            return mask
        return F.pad(mask, (0, self.num_new), value=mask.dtype == torch.bool and not self.has_keys)

    def joined(self, own: Tensor, new: Tensor, head_dim: int, dim: int) -> Tensor:
        """Return keys or values (…, H, N, D), or keys transposed, with the new ones after them."""
        heads = _split(new, -1, head_dim).transpose(-3, -2).to(own.dtype)  # (1 or B, H, P, D)
        if own.ndim == 3:  # heads are in the batch
            heads = heads.expand(own.shape[0] // heads.shape[1], -1, -1, -1).flatten(0, 1)
        else:
            heads = heads.expand(*own.shape[:-3], -1, -1, -1)
        return torch.cat([own, heads.mT if dim == -1 else heads], dim)


def _split(x: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """Return (..., H · D) as (..., H, D); one of the two may be -1."""
    return x.reshape(*x.shape[:-1], num_heads, head_dim)


def _heads_differ(pair: tuple[Tensor, Tensor], head_dims: tuple[int, int]) -> bool:
    """Return True if keys and values are not of one whole number of heads; fused attention does not check that."""
    counts = [divmod(y.shape[-1], dim) for y, dim in zip(pair, head_dims, strict=True)]
    return counts[0] != counts[1] or counts[0][1] != 0


def _tensors(args: Any) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]
