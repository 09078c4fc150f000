"""The MLP of a block: its first and its last call, and whether it mixes tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from petune.sites.layouts import is_conv, is_pointwise
from petune.sites.trace import Call


@dataclass(eq=False)
class Mlp:
    """An MLP: its input enters `first`, its output leaves `last`.

    Attributes:
        dim: Width of its output, if it returns another one than the attention.
    """

    first: Call
    last: Call
    dim: int | None = None

    @property
    def is_tokenwise(self) -> bool:
        """True if no kernel mixes neighboring tokens, and it is no gate that is computed from all tokens."""
        matrices = [c for c in self._calls() if c.has_matrix]
        return not any(map(_mixes, matrices)) and not _is_gate(self.first, matrices)

    def _calls(self) -> list[Call]:
        """Return the calls from its first to its last one, such as a convolution between two matrices."""
        around = next((c for c in self.first.lineage() if self.last.within(c)), self.first)
        return [c for c in around.subtree() if self.first.start <= c.start and c.stop <= self.last.stop]


def _mixes(call: Call) -> bool:
    """Return whether a layer has a kernel for several tokens."""
    is_row = isinstance(call.module, nn.Conv1d | nn.ConvTranspose1d) and max(call.module.kernel_size) > 1
    return is_row or (is_conv(call) and not is_pointwise(call.module))


def _is_gate(call: Call, matrices: list[Call]) -> bool:
    """Return whether all matrices in a call get one row of numbers for each sample: its tokens, pooled."""
    x, entered = call.input, [c.input for c in matrices]
    if x is None or not entered or holds_one_row(x):
        return False
    return all(y is not None and len(y) == len(x) and holds_one_row(y) for y in entered)


def holds_one_row(x: Tensor) -> bool:
    """Return whether a tensor has one row of numbers for each sample: a single token, or all tokens pooled."""
    return sum(side > 1 for side in x.shape[1:]) <= 1
