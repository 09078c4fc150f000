"""Read a forward as if its tokens had kept their shape where it flattens (B, N, D) to (B·N, D) for a while.

A layer that works on single tokens may be given all of them in one row, as `mlp(x.flatten(0, 1)).view(x.shape)` does.
Such tensors are replaced in the trace, so that everything else sees tokens. Rows keep their order: only reshapes that
keep the last dimension count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from petune.sites.trace import Trace

RESHAPES = {"reshape", "view", "flatten", "unflatten", "view_as", "reshape_as"}


class FlattenRecorder:
    """Follows flattened tokens through the operations of a forward."""

    def __init__(self) -> None:
        self._flat: dict[int, tuple[Tensor, torch.Size, int]] = {}
        """Flattened tokens, and what was computed from them row by row, with their shape as tokens and their origin."""
        self._returned: set[int] = set()
        """Origins from which something has become tokens again."""
        self._same: dict[int, Tensor] = {}
        """For flattened tokens, the tokens that they were made of, or are made to."""
        self._alive: list[Tensor] = []

    def record(self, name: str, inputs: Sequence[Tensor], result: Any) -> None:
        """Follow the tokens through one operation."""
        if not isinstance(result, Tensor) or not inputs:
            return
        x = inputs[0]
        if name in RESHAPES and x.shape[-1:] == result.shape[-1:]:
            self._reshape(x, result)
        elif result.ndim == 2:
            rows = [self._flat[id(y)][1:] for y in inputs if id(y) in self._flat and len(y) == len(result)]
            if rows:
                self._flat[id(result)] = result, *rows[0]

    def _reshape(self, x: Tensor, result: Tensor) -> None:
        if result.ndim == 2 < x.ndim and len(result) == math.prod(x.shape[:-1]) > len(x):
            self._flat[id(result)] = result, x.shape[:-1], id(result)
            self._same[id(result)] = x
        elif x.ndim == 2 < result.ndim and id(x) in self._flat and result.shape[:-1] == self._flat[id(x)][1]:
            self._alive.append(result)
            self._returned.add(self._flat[id(x)][2])
            if self._same.setdefault(id(x), result) is not result:
                self._same[id(result)] = self._same[id(x)]

    def restore(self, trace: Trace) -> None:
        """Replace flattened tokens in a trace, other than what the model itself takes and returns.

        They start with the batch (not with groups of tokens, as in Qwen2.5-VL) and become tokens again.
        """
        own = {o for _, lead, o in self._flat.values() if lead[0] == trace.batch_size} & self._returned
        others = {key for key, (_, _, o) in self._flat.items() if o not in own}
        self._same = {key: x for key, x in self._same.items() if key not in others and id(x) not in others}
        self._flat = {key: flat for key, flat in self._flat.items() if key not in others}
        if not self._flat:
            return
        for call in trace.calls[1:]:
            call.inputs = [self._tokens(x) for x in call.inputs]
            call.output = None if call.output is None else self._tokens(call.output)
        for add in trace.additions:
            add.operands, add.result = tuple(map(self._tokens, add.operands)), self._tokens(add.result)
        trace.elementwise = {
            id(y): (y, tuple(map(self._tokens, operands)))
            for y, operands in ((self._tokens(y), operands) for y, operands in trace.elementwise.values())
        }
        trace.reshaped, trace.functions = (self._pairs(made) for made in (trace.reshaped, trace.functions))
        trace.casts = [(self._tokens(x), self._tokens(y)) for x, y in trace.casts]
        for scaling in trace.scalings:
            scaling.tensor, scaling.product = self._tokens(scaling.tensor), self._tokens(scaling.product)

    def _pairs(self, made: Mapping[int, tuple[Tensor, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return what some operations made of what, with tokens; not a tensor that was only flattened."""
        pairs = ((self._tokens(y), self._tokens(x)) for y, x in made.values())
        return {id(y): (y, x) for y, x in pairs if y is not x}

    def _tokens(self, x: Tensor) -> Tensor:
        if id(x) not in self._same and id(x) in self._flat:
            self._same[id(x)] = x.reshape(*self._flat[id(x)][1], x.shape[-1])
        while id(x) in self._same:
            x = self._same[id(x)]
        return x
