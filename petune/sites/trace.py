"""Record one forward: which module is called when, by whom, with which tensors; and where tokens are mixed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from petune.sites.forward import dry_forward

FUSED = {"scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention"}
PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum"}
ADDS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass(eq=False)
class Call:
    """One call of one module. `inputs` and `output` keep their tensors alive, so that `id` is identity."""

    path: str
    module: nn.Module
    parent: Call | None
    start: int
    inputs: list[Tensor]
    extra: tuple[str, ...]
    stop: int = 0
    output: Tensor | None = None
    children: list[Call] = field(default_factory=list)

    @property
    def input(self) -> Tensor | None:
        """The first tensor it was called with."""
        return self.inputs[0] if self.inputs else None

    @property
    def width(self) -> int:
        """Size of the last dimension of what enters it."""
        return int(self.input.shape[-1]) if self.input is not None else 0

    @property
    def keeps_shape(self) -> bool:
        """Whether a token tensor enters and one of the same shape leaves."""
        x, y = self.input, self.output
        return x is not None and y is not None and x.ndim in (3, 4) and x.shape == y.shape

    @property
    def maps_tokens(self) -> bool:
        """Whether a token tensor enters and one of some shape leaves; strided attention drops tokens."""
        x, y = self.input, self.output
        return x is not None and y is not None and x.ndim in (3, 4) and y.ndim in (3, 4)

    @property
    def is_leaf(self) -> bool:
        """Whether it called no other module."""
        return not self.children

    @property
    def has_matrix(self) -> bool:
        """Whether this is a leaf that owns a weight matrix or kernel (a model's own pos_embed is none)."""
        return self.is_leaf and any(p.ndim >= 2 for p in self.module.parameters(recurse=False))

    def subtree(self) -> Iterator[Call]:
        """This call and all calls made within it, in order."""
        yield self
        for child in self.children:
            yield from child.subtree()

    def ancestors(self) -> Iterator[Call]:
        """The calls around this one, innermost first."""
        here = self.parent
        while here is not None:
            yield here
            here = here.parent

    def within(self, other: Call) -> bool:
        """Whether this call is `other` or happened inside it."""
        return other.start <= self.start and self.stop <= other.stop


@dataclass(eq=False)
class Add:
    """One addition of two tensors."""

    time: int
    operands: tuple[Tensor, ...]
    result: Tensor

    def other(self, tensor: Tensor) -> Tensor | None:
        """What was added to `tensor`, or None if `tensor` is no operand."""
        if not any(o is tensor for o in self.operands):
            return None
        return next((o for o in self.operands if o is not tensor), None)


@dataclass(eq=False)
class Mixer:
    """One softmax by which tokens are weighed against each other.

    Attributes:
        time: When the weights were used.
        call: The innermost call around it.
        strong: Whether several queries look at several keys. One query only pools (class attention, gates).
        used: Whether the weights went into a product.
        size: How many things are weighed.
    """

    time: int
    call: Call
    strong: bool
    used: bool = True
    size: int = 0

    def is_over_tokens(self, unit: Call) -> bool:
        """Whether it weighs tokens of what enters `unit`, and not experts or branches."""
        return self.used or (unit.input is not None and self.size in unit.input.shape[1:])


@dataclass(eq=False)
class Trace:
    """Everything recorded in one forward."""

    calls: list[Call] = field(default_factory=list)
    mixers: list[Mixer] = field(default_factory=list)
    adds: list[Add] = field(default_factory=list)

    @property
    def root(self) -> Call:
        """The model's own call."""
        return self.calls[0]

    def maker(self, tensor: Tensor | None) -> Call | None:
        """The innermost call that returned `tensor`, or None if no module did."""
        made = [c for c in self.calls if tensor is not None and c.output is tensor]
        return max(made, key=lambda c: c.start, default=None)


class _Recorder(TorchFunctionMode):
    """Hooks on every module of the model, and a watch on the operations between them."""

    def __init__(self, model: nn.Module, skip: set[nn.Module]) -> None:
        super().__init__()
        self.trace, self.clock, self.stack = Trace(), 0, list[Call]()
        self.weights: dict[int, tuple[Tensor, Mixer, Call]] = {}
        self.handles: list[Any] = []
        for path, module in model.named_modules():
            if module not in skip:
                self._watch(path, module)

    def _watch(self, path: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            parent = self.stack[-1] if self.stack else None
            inputs = list(tensors_in((args, kwargs)))
            names = [f"argument {i}" for i, a in enumerate(args) if i and holds_tensor(a)]
            names += [k for k, v in kwargs.items() if holds_tensor(v)]
            extra = tuple(names if args else names[1:])
            call = Call(path, module, parent, self.tick(), inputs, extra)
            if parent is not None:
                parent.children.append(call)
            self.trace.calls.append(call)
            self.stack.append(call)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            call = self.stack.pop()
            whole = logits_in(output) if call.parent is None else output
            call.output, call.stop = next(tensors_in(whole), None), self.tick()
            self.weights = {k: w for k, w in self.weights.items() if w[2] is not call}

        self.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self.handles.append(module.register_forward_hook(leave))

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ADDS and isinstance(result, Tensor):
            operands = tuple(a for a in args if isinstance(a, Tensor))
            self.trace.adds.append(Add(self.tick(), operands, result))
        if self.stack:
            self._see_mixing(name, args, kwargs, result)
        return result

    def _see_mixing(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Follow the weights of a softmax to the product that uses them, within the call that computed them."""
        given = list(tensors_in((args, kwargs or {})))
        if name in FUSED and given:
            query = given[0]
            many = query.shape[0 if name == "multi_head_attention_forward" else -2] > 1
            self.trace.mixers.append(Mixer(self.tick(), self.stack[-1], many))
        elif name == "softmax" and given and given[0].ndim >= 3:  # over classes it mixes no tokens
            call = self.stack[-1]
            scope = call if call.parent is None or any(True for _ in call.module.children()) else call.parent
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else -1)
            mixer = Mixer(self.tick(), call, False, used=False, size=given[0].shape[-1 if dim is None else dim])
            self.trace.mixers.append(mixer)
            self.weights[id(result)] = result, mixer, scope
        else:
            self._follow([self.weights[id(t)] for t in given if id(t) in self.weights], name, result)

    def _follow(self, weights: list[tuple[Tensor, Mixer, Call]], name: str, result: Any) -> None:
        for weight, mixer, scope in weights:
            if name not in PRODUCTS:
                self.weights |= {id(t): (t, mixer, scope) for t in tensors_in(result)}
            else:
                mixer.used = True
                if weight.shape[-1] > 1 and weight.shape[-2] > 1:
                    mixer.strong, mixer.time = True, self.tick()


def record(model: nn.Module, input_size: tuple[int, int, int], skip: set[nn.Module]) -> Trace:
    """Trace one forward of `model`, leaving out the modules in `skip`.

    Raises:
        AttachError: The forward fails on an image of that size.
    """

    @contextlib.contextmanager
    def watch() -> Iterator[Trace]:
        recorder = _Recorder(model, skip)
        try:
            with recorder:
                yield recorder.trace
        finally:
            for handle in recorder.handles:
                handle.remove()

    trace: Trace = dry_forward(model, input_size, watch)
    return trace


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def logits_in(output: Any) -> Any:
    """What a model calls its logits where it returns more than that: an attribute (transformers) or entry `logits`."""
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    return getattr(output, "logits", output)


def holds_tensor(value: Any) -> bool:
    """Whether `value` is or contains a tensor."""
    return next(tensors_in(value), None) is not None
