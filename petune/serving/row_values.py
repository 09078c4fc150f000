"""Compute a module once for all rows of a batch, where adapters only scale and shift what it returns.

A layer's bias, and weight and bias of a normalization, act after the layer's own work: one call without them serves all
rows, and each row gets its own values in one step. A step for each adapter would cost more than the layer itself.
Shapes: B rows of the batch, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SHIFTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules that add their bias to what they return."""
SCALED = (nn.LayerNorm, nn.RMSNorm)
"""Modules that multiply what they return by their weight, and then add their bias."""
TOLERANCE = 1e-2
"""Largest error that can be rounding, as a part of the output: a bfloat16 has 8 bits."""


def affine_names(module: nn.Module) -> list[str]:
    """Return the names of the tensors that scale and shift the output of a module; none if it is another module."""
    names = ["bias"] if isinstance(module, SHIFTED) else ["weight", "bias"] if isinstance(module, SCALED) else []
    return [name for name in names if module._parameters.get(name) is not None]


def can_stack(module: nn.Module, names: Sequence[str]) -> bool:
    """Return True if the tensors of these names only scale and shift the output of a module.

    A subclass may use them in another way, so a small input is computed both ways.
    """
    affine = affine_names(module)
    if not names or not {*names} <= {*affine} or "forward" in module.__dict__:
        return False
    if isinstance(module, SCALED) and len(module.normalized_shape) > 1:
        return False
    return type(module) in SHIFTED + SCALED or _is_affine(module, affine)


@torch.no_grad()
def _is_affine(module: nn.Module, names: Sequence[str]) -> bool:
    """Return True if a module computes the same with its tensors as without them, and their effect added."""
    generator = torch.Generator().manual_seed(0)

    def noise(shape: Iterable[int]) -> Tensor:
        some = next(module.parameters())
        return torch.randn(*shape, generator=generator).to(some.device, some.dtype)

    values = {name: nn.Parameter(noise(module._parameters[name].shape), requires_grad=False) for name in names}  # type: ignore[union-attr]
    x = noise(_small_shape(module))
    try:
        with _tensors(module, values):
            expected = module.forward(x).float()
        output = stacked_output(module, module.forward, x, {name: [v] * len(x) for name, v in values.items()}).float()
    except Exception:  # a subclass may take something else than a tensor, or rely on its tensors
        return False
    if output.shape != expected.shape:
        return False
    return float((output - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def _small_shape(module: Any) -> tuple[int, ...]:
    """Return the shape of a small input."""
    if isinstance(module, SCALED):
        return 2, 3, *module.normalized_shape
    if isinstance(module, nn.Linear):
        return 2, 3, module.in_features
    return 2, module.in_channels, *(d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))


def stacked_output(
    module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, values: Mapping[str, Sequence[Tensor]]
) -> Tensor:
    """Return the output of a module whose rows have a weight and a bias each.

    Args:
        module: One of which `can_stack` is true.
        forward: What it computes.
        x: (B·k, ...): k entries for each row, such as windows.
        values: For each name of `affine_names`, the tensors of the B rows, (D,).
    """
    stacked = {name: per_entry(torch.stack([*tensors]), len(x)) for name, tensors in values.items()}
    if _is_plain_linear(module, x):
        return _linear(x, module._parameters["weight"], stacked["bias"])  # type: ignore[arg-type]
    with _tensors(module, dict.fromkeys(values)):
        # in half precision a normalization rounds once, after weight and bias
        y = forward(x.float() if isinstance(module, SCALED) and x.dtype.itemsize < 4 else x)
    dim = 1 if not isinstance(module, (nn.Linear, *SCALED)) else -1
    bias, weight = (
        None if t is None else along(t, y, dim).to(y.dtype) for t in (stacked.get("bias"), stacked.get("weight"))
    )
    y = y if weight is None else y.mul_(weight)
    y = y if bias is None else y.add_(bias)
    return y.to(x.dtype) if isinstance(module, SCALED) and not torch.is_autocast_enabled(x.device.type) else y


def _is_plain_linear(module: nn.Module, x: Tensor) -> bool:
    """Return True if a module multiplies by a matrix that is an ordinary tensor of the dtype of its input."""
    if type(module) is not nn.Linear or torch.is_autocast_enabled(x.device.type):
        return False
    return type(module.weight) in {Tensor, nn.Parameter} and module.weight.dtype == x.dtype


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return x @ weight.T + bias; as in torch's own linear layer, the product is added to the bias in place."""
    shape = (*x.shape[:-1], len(weight))
    output = bias.view(len(x), *[1] * (x.ndim - 2), -1).expand(shape).reshape(-1, len(weight))
    if output.data_ptr() == bias.data_ptr():
        output = output.clone()
    return output.addmm_(x.reshape(-1, x.shape[-1]), weight.t()).view(shape)


def per_entry(values_BD: Tensor, length: int) -> Tensor:
    """Repeat the values of each row for its entries in a tensor of this length."""
    each = length // len(values_BD)
    return values_BD if each == 1 else values_BD.repeat_interleave(each, 0)


def along(values: Tensor, y: Tensor, dim: int) -> Tensor:
    """Return (B, D) in a shape whose D is a dimension of `y`, and whose B is its first one."""
    shape = [1] * y.ndim
    shape[0], shape[dim] = values.shape
    return values.view(shape)


@contextmanager
def _tensors(module: nn.Module, values: Mapping[str, nn.Parameter | None]) -> Iterator[None]:
    """Let a module have these parameters inside the context."""
    before = {name: module._parameters[name] for name in values}
    try:
        module._parameters.update(values)
        yield
    finally:
        module._parameters.update(before)
