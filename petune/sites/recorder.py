"""Record one forward: which module is called when, by whom and with which tensors; and where tokens attend to others.

There is one recorder. `record` uses it to find sites; `record_calls` uses it to find the layers that a site calls, and
to prove that an adapter is called at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode

from petune.base.errors import AttachError, PetuneError
from petune.sites.composite_norms import join_composite_norms
from petune.sites.flattened import RESHAPES, FlattenRecorder
from petune.sites.flow import Flow
from petune.sites.forward import dry_forward, forward_of, tensors_in
from petune.sites.hooked import removed_after
from petune.sites.input_spec import InputSpec
from petune.sites.operations import ACTIVATIONS, AFFINE_NORMS, JOINS, MATRIX_LAYERS, MULTI_HEAD, PRODUCTS, SDPA
from petune.sites.parameter_uses import uses_in
from petune.sites.random_numbers import is_large, watch_draws
from petune.sites.returned import logits_in, tensors_returned
from petune.sites.sums import DIVISIONS, MULTIPLICATIONS, SumRecorder, renamed
from petune.sites.trace import AttentionOp, Call, Scaling, Trace, is_vector
from petune.sites.unsuitable import why_method_fails

FUSED_ATTENTION = {SDPA, MULTI_HEAD, "_native_multi_head_attention"}
NORMALIZATIONS = AFFINE_NORMS | {
    "normalize", "norm", "vector_norm", "rsqrt", "var", "std", "var_mean", "std_mean",
}  # fmt: skip
SQUASHINGS = {"tanh", "erf"}
SLIGHT = 0.1
"""A branch times this number, or more, still counts."""
COPIES = {"contiguous", "clone"}
SAMPLERS = {"grid_sample"}
"""Operations that read values at computed places of an image: deformable attention weighs what they return."""


def record(model: nn.Module, spec: InputSpec, skip: Set[nn.Module] = frozenset()) -> Trace:
    """Record calls and operations of one forward, on the meta device if the model allows it.

    Args:
        model: Modes and random state are as before afterwards.
        spec: What it takes.
        skip: Modules whose calls are not recorded.

    Raises:
        AttachError: The forward fails on such inputs.
    """
    computing = (m for m in model.modules() if isinstance(m, ParametrizationList))  # they are called with weights
    skipped = {*skip, *(m for of_weights in computing for m in of_weights.modules())}
    modules = [(path, module) for path, module in model.named_modules() if module not in skipped]
    watch = watch_draws if is_large(model) else contextlib.nullcontext
    flattened: list[FlattenRecorder] = []

    @contextlib.contextmanager
    def recorder() -> Iterator[Trace]:
        with watch() as draws, _record_calls(modules) as calls, _OperationRecorder(calls) as operations:
            yield calls.trace
        flattened[:] = [operations.flattened]
        calls.trace.draws_nothing = draws is not None and not draws.any

    trace: Trace = dry_forward(model, spec, recorder)
    trace.batch_size = spec.num_samples_in(trace.root.inputs)
    flattened[0].restore(trace)
    _mark_packed(trace)
    join_composite_norms(trace)
    return trace


def _mark_packed(trace: Trace) -> None:
    """Mark the calls with tokens as (tokens, width), of as many rows as attend to each other (Qwen2-VL's tower)."""
    inputs = [op.call.input for op in trace.attention_ops if op.many_queries]
    rows = {len(x) for x in inputs if x is not None and x.ndim == 2 and len(x) > max(1, trace.batch_size)}
    for call in trace.calls:
        call.is_packed = call.input is not None and call.input.ndim == 2 and len(call.input) in rows


def record_calls(
    model: nn.Module, spec: InputSpec, modules: Iterable[nn.Module], *, num_images: int = 1
) -> dict[nn.Module, Call]:
    """Record the first call of each of `modules` in a real forward of black images, in eval mode.

    Args:
        model: Modes and random state are as before afterwards.
        spec: What it takes.
        modules: Modules of the model.
        num_images: Number of images. 1 is the fastest, and every model runs on it.

    Returns:
        The calls by module; a module that was not called is missing.

    Raises:
        AttachError: The forward fails.
    """
    watched = dict.fromkeys(modules, "")
    named = [(path, module) for path, module in model.named_modules() if module in watched]
    try:
        with _record_calls(named) as calls:
            forward_of(model, spec.zeros(num_images))
    except PetuneError:
        raise
    except Exception as error:  # whatever a model's own code, or an adapter's, raises
        raise AttachError(
            f"the forward of {type(model).__name__} fails with the method attached: {why_method_fails(model, error)}",
            cli_hint="--debug shows where it fails",
        ) from error
    return {call.module: call for call in reversed(calls.trace.calls)}


class _CallRecorder:
    """Records the calls of modules, by hooks."""

    def __init__(self) -> None:
        self.trace = Trace()
        self.stack: list[Call] = []
        self.flow: Flow | None = None
        self.own: dict[int, tuple[Tensor, str]] = {}
        """The model's parameters, and what was made of one alone (its transpose), by identity, with their keys."""
        self._time = 0

    def tick(self) -> int:
        """Return the next time."""
        self._time += 1
        return self._time

    def watch(self, path: str, module: nn.Module) -> list[Any]:
        """Record each call of a module; return handles of the hooks."""

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            parent = self.stack[-1] if self.stack else None
            names = [f"argument {i}" for i, a in enumerate(args) if i and _holds_tensor(a)]
            names += [k for k, v in kwargs.items() if _holds_tensor(v)]
            extra_inputs = tuple(names if args else names[1:])
            call = Call(path, module, parent, self.tick(), list(tensors_in((args, kwargs))), extra_inputs)
            if parent is not None:
                parent.children.append(call)
            self.trace.calls.append(call)
            self.stack.append(call)
            self._enter_flow(call)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            call = self.stack.pop()
            is_root = call.parent is None
            returned = list(tensors_returned(output) if is_root else tensors_in(output))
            call.output = next(tensors_returned(logits_in(output)), None) if is_root else next(iter(returned), None)
            call.stop = self.tick()
            if is_root:
                self.trace.outputs = returned
            if self.flow is not None:
                self.flow.leave(call.start, returned)

        is_whole = not path  # what it is called with, before hooks of its own change that
        return [
            module.register_forward_pre_hook(enter, with_kwargs=True, prepend=is_whole),
            module.register_forward_hook(leave),
        ]

    def _enter_flow(self, call: Call) -> None:
        if self.flow is None:
            return
        if call.parent is None:
            self.own = {id(p): (p, key) for key, p in call.module.named_parameters()}
            self.flow.start([*call.inputs, *call.module.parameters(), *call.module.buffers()])
        self.flow.enter(call.start, call.inputs)


@contextlib.contextmanager
def _record_calls(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[_CallRecorder]:
    recorder = _CallRecorder()
    handles = [handle for path, module in modules for handle in recorder.watch(path, module)]
    with removed_after(handles):
        yield recorder


class _OperationRecorder(TorchFunctionMode):
    """Records additions and attention, on the clock of the calls."""

    def __init__(self, calls: _CallRecorder) -> None:
        super().__init__()
        self.calls = calls
        self.trace = calls.trace
        self.flow = calls.flow = calls.trace.flow
        self.sums = SumRecorder(calls.trace, calls.tick)
        self.flattened = FlattenRecorder()
        self.weights: dict[int, tuple[Tensor, AttentionOp, Call]] = {}
        """Attention weights by identity, the operation that they are of, and the call in which they are followed."""
        self.samples: dict[int, Tensor] = {}
        """Values that were sampled from an image, and what was made of them, by identity."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").partition(".")[0]  # torch.ops.aten.add.Tensor
        returned = func(*args, **(kwargs or {}))
        result = renamed(name, args, kwargs or {}, returned)
        self.sums.record(name, args, kwargs or {}, result)
        if name in MULTIPLICATIONS | DIVISIONS and isinstance(result, Tensor):
            self._record_scaling(name, args, result)
        if self.calls.stack:
            tensors = list(tensors_in((args, kwargs or {})))
            self.flow.add(name, tensors, list(tensors_in(returned)))
            if result is not returned:
                self.flow.add("view", [returned], [result])
            self.flattened.record(name, tensors, result)
            self.calls.stack[-1].normalizes |= name in NORMALIZATIONS
            self.calls.stack[-1].squashes |= name in SQUASHINGS
            self._record_change(name, tensors, result)
            self._record_product(name, tensors, result)
            if len(tensors) > 1:
                self._record_uses(name, args, kwargs or {})
            self._record_attention(name, args, kwargs or {}, tensors, result)
        return result

    def _record_change(self, name: str, tensors: list[Tensor], result: Any) -> None:
        """Record a reshape, a norm or an activation of a tensor."""
        if not tensors or not isinstance(result, Tensor) or result is tensors[0]:
            return
        if name in RESHAPES | COPIES or (name in JOINS and len(tensors) == 1):  # as by pack of einops
            self.trace.reshaped[id(result)] = result, tensors[0]
        elif name.removesuffix("_") in NORMALIZATIONS | ACTIVATIONS and result.shape == tensors[0].shape:
            self.trace.functions[id(result)] = result, tensors[0]
            if result._base is not None:  # a view, as `renamed` returns of what changed in place
                self.trace.overwritten.add(id(tensors[0]))

    def _record_product(self, name: str, tensors: list[Tensor], result: Any) -> None:
        """Record that a parameter enters a product; follow a parameter that an operation takes alone."""
        keys = [self.calls.own[id(t)][1] for t in tensors if id(t) in self.calls.own]
        if keys and len(tensors) > 1 and name in PRODUCTS | MATRIX_LAYERS:
            self.trace.products += [(self.calls.tick(), self.calls.stack[-1], key) for key in keys]
        elif keys and len(tensors) == 1 and isinstance(result, Tensor):
            self.calls.own[id(result)] = result, keys[0]

    def _record_uses(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Record what the parameters are that an operation takes with other tensors."""
        for key, use in uses_in(name, args, kwargs, self.calls.own):
            self.trace.uses.setdefault(key, {}).setdefault(use, self.calls.tick())

    def _record_scaling(self, name: str, args: Any, result: Tensor) -> None:
        """Record a product of a tensor with a number, or with a vector that has one number for each channel.

        So is a tensor that is divided by one, and not one that divides.
        """
        tensors = [a for a in args if isinstance(a, Tensor)]
        scaled = [t for t in tensors if t.shape == result.shape]
        factors = [t for t in tensors if t.shape != result.shape]
        if (
            len(scaled) == 1
            and (scaled[0] is args[0] or name in MULTIPLICATIONS)
            and all(is_vector(factor) for factor in factors)
        ):
            is_own = all(id(factor) in self.calls.own for factor in factors)
            is_slight = not factors and _factor(name, args) >= SLIGHT
            self.trace.scalings.append(Scaling(scaled[0], result, is_own, is_slight))

    def _record_attention(
        self, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], result: Any
    ) -> None:
        is_sampled = name in SAMPLERS or any(id(t) in self.samples for t in tensors)
        if name in FUSED_ATTENTION and tensors:
            axis = 0 if name == MULTI_HEAD else -2
            sizes = {x.shape[axis] for x in tensors[:2]}  # of queries and keys
            op = AttentionOp(
                self.calls.tick(), self.calls.stack[-1], tensors[0].shape[axis] > 1, is_single=sizes == {1}
            )
            self.trace.attention_ops.append(op)
        elif name == "softmax" and tensors and tensors[0].ndim >= 3:  # over classes it mixes no tokens
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            self._record_softmax(tensors[0].shape[-1 if dim is None else dim], result)
        else:
            weighs_samples = is_sampled and name in MULTIPLICATIONS
            applies = (name in PRODUCTS and not self._gates(name, args)) or weighs_samples
            self._follow([t for t in tensors if id(t) in self.weights], result, applies=applies)
            if is_sampled and not weighs_samples:
                self.samples |= {id(t): t for t in tensors_in(result)}

    def _gates(self, name: str, args: Any) -> bool:
        """Return whether an einsum weighs what each query has for itself, as the outputs of its experts, not tokens."""
        if name != "einsum" or not args or not isinstance(args[0], str):
            return False
        operands = list(tensors_in(args[1:]))
        letters = args[0].replace(" ", "").partition("->")[0].split(",")
        if len(letters) != len(operands):
            return False
        of_weights = [part[-2:] for part, x in zip(letters, operands, strict=True) if id(x) in self.weights]
        others = [part for part, x in zip(letters, operands, strict=True) if id(x) not in self.weights]
        return any(set(pair) <= set(part) for pair in of_weights if len(pair) == 2 for part in others)

    def _record_softmax(self, num_keys: int, result: Tensor) -> None:
        call = self.calls.stack[-1]
        attention = AttentionOp(self.calls.tick(), call, many_queries=False, applied=False, num_keys=num_keys)
        self.trace.attention_ops.append(attention)
        # the weights of nn.Softmax, alone or in a Sequential with a dropout, are used by its caller
        scope = call
        while scope.parent is not None and next(scope.module.parameters(), None) is None:
            scope = scope.parent
        self.weights[id(result)] = result, attention, scope

    def _follow(self, inputs: list[Tensor], result: Any, *, applies: bool) -> None:
        """Follow weights through an operation, up to the one that applies them."""
        for tensor in inputs:
            weights, attention, scope = self.weights[id(tensor)]
            if scope.stop:
                continue  # outside the call that computed them they are ordinary features
            if not applies:
                self.weights |= {id(t): (t, attention, scope) for t in tensors_in(result)}
                continue
            attention.applied = True
            attention.is_single |= weights.shape[-2:] == (1, 1)
            if weights.shape[-1] > 1 and weights.shape[-2] > 1:
                attention.many_queries = True
                attention.time = self.calls.tick()


def _holds_tensor(value: Any) -> bool:
    return next(tensors_in(value), None) is not None


def _factor(name: str, args: Sequence[Any]) -> float:
    """Return the absolute value of the plain number that a tensor is multiplied with; 0 without one."""
    number = next((abs(float(a)) for a in args if isinstance(a, int | float)), 0.0)
    return 1 / number if number and name in DIVISIONS else number
