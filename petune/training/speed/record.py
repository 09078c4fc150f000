"""Watch one forward: the calls of modules, what each operation reads and makes, and what therefore never changes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten

PLAIN = (type(None), bool, int, float, str)


@dataclass
class Call:
    """A call of a module: in which other calls, what entered first, what it returned, and whether that was new."""

    module: nn.Module
    inside: tuple[int, ...]
    first: Any
    leaves: list[Any] = field(default_factory=list)
    spec: TreeSpec | None = None
    new: bool = False


@dataclass
class Operation:
    """What one operation read and made, by identity, and the calls it happened in."""

    reads: tuple[int, ...]
    makes: tuple[int, ...]
    inside: tuple[int, ...]


class Recorder(TorchFunctionMode):
    """Watches one forward; afterwards it knows what each operation read and made, and in which calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[Call] = []
        self.operations: list[Operation] = []
        self.x = self.out = torch.empty(0)
        self._stack: tuple[int, ...] = ()
        self._held: list[Any] = []  # so that identities stay unique
        self._seen: dict[int, int] = {}  # identity of every tensor so far, to its number

    def record(self, x: Tensor) -> Recorder:
        """Run the model on images (B, channels, height, width)."""
        self.x = x
        self._see((x,))
        modules = [m for m in self.model.modules() if m is not self.model]
        with self, forwards({m: self._watched(m) for m in modules}):
            self.out = self.model(x)
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        reads = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        makes = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if out is None:
            makes = reads[:1]  # x[i] = y changes x
        if makes:
            self._held.append((reads, makes))
            self._see(makes)
            self.operations.append(Operation(_ids(reads), _ids(makes), self._stack))
        return out

    def _watched(self, module: nn.Module) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            number, around = len(self.calls), self._stack
            call = Call(module, around, args[0] if args else None)
            self.calls.append(call)
            self._stack = (*around, number)
            mark = len(self._seen)
            try:
                out = original(*args, **kwargs)
            finally:
                self._stack = around
            call.leaves, call.spec = tree_flatten(out)
            call.new = any(isinstance(t, Tensor) and self._seen.get(id(t), mark) >= mark for t in call.leaves)
            self._held.append((args, call.leaves))
            return out

        return forward

    def _see(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._seen.setdefault(id(tensor), len(self._seen))

    def left_out(self) -> set[int] | None:
        """Numbers of the calls that need not happen again; None where what trains reads the image itself."""
        often = Counter(id(c.module) for c in self.calls)
        opened: set[int] = set()
        while True:
            free = [n for n, c in enumerate(self.calls) if n not in opened and often[id(c.module)] == 1]
            free = [n for n in free if _is_frozen(self.calls[n])]
            chosen = {n for n in free if not set(self.calls[n].inside) & set(free)}
            live, leaking, _ = self.live(chosen, {})
            if not leaking:
                return None if id(self.x) in live or not chosen else chosen
            opened |= leaking

    def entries(self, chosen: set[int]) -> dict[int, int]:
        """Calls that happen and are entered by what no gradient reaches, made between modules; and its identity."""
        returned = {id(t) for n in chosen for t in self.calls[n].leaves}
        often = Counter(id(c.module) for c in self.calls)
        found = {}
        for number, call in enumerate(self.calls):
            runs = number not in chosen and not set(call.inside) & chosen and often[id(call.module)] == 1
            x = call.first
            if runs and isinstance(x, Tensor) and not x.requires_grad and id(x) not in {*returned, id(self.x)}:
                found[number] = id(x)
        return found

    def live(self, chosen: set[int], entries: dict[int, int]) -> tuple[set[int], set[int], set[int]]:
        """What the output depends on.

        Args:
            chosen: Calls that are left out.
            entries: Calls that are entered by a value that is kept, and its identity.

        Returns:
            Identities of tensors that matter outside of the chosen calls; those of these calls that others look into;
            the entries that matter.
        """
        live, entered = {id(t) for t in tree_flatten(self.out)[0]}, set[int]()
        for operation in reversed(self.operations):
            if not set(operation.inside) & chosen and live & set(operation.makes):
                through = {n for n in operation.inside if entries.get(n) in operation.reads}
                entered |= through
                live |= set(operation.reads) - {entries[n] for n in through}
        leaking = set()
        for operation in self.operations:
            for number in set(operation.inside) & chosen:
                returned = {id(t) for t in self.calls[number].leaves}
                if (live & set(operation.makes)) - returned:
                    leaking.add(number)
        return live, leaking, entered


def _is_frozen(call: Call) -> bool:
    tensors = [t for t in call.leaves if isinstance(t, Tensor)]
    if not call.new or any(not isinstance(t, (Tensor, *PLAIN)) for t in call.leaves):
        return False
    return not any(t.requires_grad for t in tensors) and not any(m.training for m in call.module.modules())


def _ids(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(id(t) for t in tensors)


@contextlib.contextmanager
def forwards(instead: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these modules have another `forward`; their hooks run as ever."""
    own = {module: module.__dict__.get("forward") for module in instead}
    try:
        for module, forward in instead.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, before in own.items():
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before
