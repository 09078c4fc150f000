"""The flow of data in one forward: which calls of modules computed something from which others."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

from torch import Tensor

ORIGINAL: tuple[int, ...] = ()
INPUTS = OUTPUTS = 0
"""The keys in `Flow.sources` of the model's inputs, as a source, and of its outputs; others are times of calls."""
UNKNOWN = -1
"""The number of tensors that no recorded operation has made; they may depend on everything before them."""


class Flow:
    """The operations of a forward, and the calls of modules between them, in order.

    A tensor has a number, and a new one after each operation that changes it in place.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0
        self._steps: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self._entered: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._left: list[tuple[int, int, tuple[int, ...]]] = []

    def start(self, tensors: Iterable[Tensor]) -> None:
        """Take tensors that are there before the forward: inputs, parameters, buffers."""
        self._steps.append((ORIGINAL, tuple(self._new(t) for t in tensors)))

    def add(self, name: str, inputs: list[Tensor], results: list[Tensor]) -> None:
        """Record an operation of this name."""
        changed = results
        if is_in_place(name):
            changed = results or inputs[:1]  # __setitem__ returns nothing
            changed = [*changed, *(t._base for t in changed if t._base is not None)]
        if changed:
            read = self._numbers_of(inputs if changed is results else [*inputs, *changed])
            self._steps.append((read, tuple(self._new(t) for t in changed)))

    def enter(self, call: int, inputs: list[Tensor]) -> None:
        """Record that a call begins, by the time of its start."""
        self._entered[call] = (len(self._steps), self._numbers_of(inputs))

    def leave(self, call: int, outputs: Iterable[Tensor]) -> None:
        """Record that the call that began at this time returns."""
        self._left.append((len(self._steps), call, self._numbers_of(outputs)))

    def sources(self, spans: Mapping[int, int], targets: Iterable[int]) -> dict[int, set[int]]:
        """Return for each target the spans that something that enters it was computed from.

        Args:
            spans: Parts of the forward: the start of the call that each ends with, and its key; INPUTS is the
                start of the forward.
            targets: Calls, by the times of their starts; 0 is the end of the forward: the model's outputs.
        """
        bits = {key: 1 << i for i, key in enumerate(spans.values())}
        masks: dict[int, int] = {}
        events = sorted([*self._leaving(spans), *self._entering(targets)], key=lambda event: event[0])
        result: dict[int, set[int]] = {}
        done = every = 0
        for step, call, numbers, is_target in events:
            for read, made in self._steps[done:step]:
                mask = _union(masks, read, every)
                masks.update(dict.fromkeys(made, mask))
            done = step
            if is_target:
                mask = _union(masks, numbers, every)
                result[call] = {key for key, bit in bits.items() if mask & bit}
            else:
                every |= bits[spans[call]]
                masks.update({n: masks.get(n, 0) | bits[spans[call]] for n in numbers if n != UNKNOWN})
        return result

    def _leaving(self, spans: Mapping[int, int]) -> list[tuple[int, int, tuple[int, ...], bool]]:
        given = [(step, INPUTS, numbers, False) for step, numbers in [*self._entered.values()][:1] if INPUTS in spans]
        return [*given, *((step, call, numbers, False) for step, call, numbers in self._left if call in spans)]

    def _entering(self, targets: Iterable[int]) -> list[tuple[int, int, tuple[int, ...], bool]]:
        entered = [(call, *self._entered[call]) for call in targets if call in self._entered]
        returned = [(step, 0, numbers, True) for step, _, numbers in self._left[-1:] if 0 in {*targets}]
        return [*((step, call, numbers, True) for call, step, numbers in entered), *returned]

    def _new(self, tensor: Tensor) -> int:
        self._count += 1
        self._numbers[id(tensor)] = (weakref.ref(tensor), self._count)
        return self._count

    def _numbers_of(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        return tuple(map(self._number_of, tensors))

    def _number_of(self, tensor: Tensor) -> int:
        reference, number = self._numbers.get(id(tensor), (None, UNKNOWN))
        return number if reference is not None and reference() is tensor else UNKNOWN


def is_in_place(name: str) -> bool:
    """Return whether an operation of this name changes its first tensor."""
    if name.endswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in {"__invert__", "__index__", "__int__"})
    return name.endswith("_")


def _union(masks: Mapping[int, int], numbers: Iterable[int], every: int) -> int:
    union = 0
    for number in numbers:
        union |= every if number == UNKNOWN else masks.get(number, 0)
    return union
