"""The record of one forward: calls of modules, additions and attention, with the tensors of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from petune.sites.flow import Flow

TOKENS = (3, 4, 5, 6, 7)
"""Numbers of dimensions of tokens: in a row, laid out as an image, as a video, as windows of these."""


def own_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's own parameters, also those that it computes its weights from (torch's parametrizations)."""
    own = [*module.parameters(recurse=False)]
    if is_parametrized(module):
        own += [p for name in module.parametrizations for p in module.parametrizations[name].parameters()]  # type: ignore[union-attr,index]
    return own


def is_vector(parameter: Tensor) -> bool:
    """Return whether a parameter has one number for each channel, in whatever shape: (D,), (1, D, 1, 1)."""
    return sum(side > 1 for side in parameter.shape) <= 1


@dataclass(eq=False)
class Call:
    """One call of one module.

    Attributes:
        path, module: The module.
        parent: The call around it; None for the outermost.
        start, stop: Times of entry and exit, on one clock for all calls and operations of the forward.
        inputs: All tensors that it was called with. They are kept alive, so that identity means something.
        extra_inputs: Names of the arguments with tensors, after the first.
        output: The first tensor that it returned; of the model's own call the logits.
        children: The calls that it made itself.
        normalizes: True if it computed a norm or a variance itself.
        squashes: True if it computed a tanh or an error function itself.
        is_packed: True if its input is (tokens, width): all images in one row, without a batch dimension.
    """

    path: str
    module: nn.Module
    parent: Call | None
    start: int
    inputs: list[Tensor]
    extra_inputs: tuple[str, ...]
    stop: int = 0
    output: Tensor | None = None
    children: list[Call] = field(default_factory=list)
    normalizes: bool = False
    squashes: bool = False
    is_packed: bool = False

    @property
    def input(self) -> Tensor | None:
        """The first tensor that it was called with."""
        return self.inputs[0] if self.inputs else None

    @property
    def width(self) -> int:
        """Size of the last dimension of its input."""
        return int(self.input.shape[-1]) if self.input is not None else 0

    @property
    def keeps_shape(self) -> bool:
        """True if a token tensor enters and one of the same shape leaves."""
        x, y = self.input, self.output
        return x is not None and y is not None and self.holds_tokens(x) and x.shape == y.shape

    @property
    def maps_tokens(self) -> bool:
        """True if a token tensor enters and one of any shape leaves; strided attention drops tokens."""
        x, y = self.input, self.output
        return x is not None and y is not None and self.holds_tokens(x) and self.holds_tokens(y)

    def holds_tokens(self, x: Tensor) -> bool:
        """Return whether a tensor of this call has as many dimensions as tokens have."""
        return x.ndim in TOKENS or (self.is_packed and x.ndim == 2)

    @property
    def is_leaf(self) -> bool:
        """True if it called no other module."""
        return not self.children

    @property
    def has_matrix(self) -> bool:
        """True for a leaf that owns a weight matrix or kernel (a model's own pos_embed does not count).

        A layer that keeps the shape and owns (1, D, 1, 1) only scales channels.
        """
        if not self.is_leaf:
            return False
        x, y = self.input, self.output
        may_scale = x is not None and y is not None and x.shape == y.shape
        return any(p.ndim >= 2 and not (may_scale and is_vector(p)) for p in own_weights(self.module))

    def subtree(self) -> Iterator[Call]:
        """Yield this call and all calls inside it, in order."""
        yield self
        for child in self.children:
            yield from child.subtree()

    def inner(self) -> Iterator[Call]:
        """Yield all calls inside this one, in order."""
        for child in self.children:
            yield from child.subtree()

    def ancestors(self) -> Iterator[Call]:
        """Yield the calls around this one, innermost first."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent

    def lineage(self) -> Iterator[Call]:
        """Yield this call, and the calls around it, innermost first."""
        yield self
        yield from self.ancestors()

    def within(self, other: Call) -> bool:
        """Return whether this call is `other` or happened inside it."""
        return other.start <= self.start and self.stop <= other.stop


@dataclass(eq=False)
class Addition:
    """One sum of tensors: usually of two; `torch.stack(…).sum(0)` adds several."""

    time: int
    operands: tuple[Tensor, ...]
    result: Tensor

    def adds_to(self, tensor: Tensor | None) -> bool:
        """Return whether something else is added to `tensor`."""
        return any(o is tensor for o in self.operands) and any(o is not tensor for o in self.operands)


@dataclass(eq=False)
class Scaling:
    """A tensor that is only scaled.

    Attributes:
        tensor, product: Before and after.
        is_own: True if the factors are numbers and parameters, and not computed from the input.
        is_slight: True if the only factor is a plain number of 0.1 or more (Conformer's 0.5).
    """

    tensor: Tensor
    product: Tensor
    is_own: bool = False
    is_slight: bool = False


@dataclass(eq=False)
class AttentionOp:
    """One softmax over attention logits, or one fused attention.

    Attributes:
        time: When the weights were last used.
        call: The innermost call around it.
        many_queries: True if several queries attend to several keys. One query only pools (class attention, gates).
        is_single: True if one query attends to one key, as where a stage has a single token left.
        applied: True if the weights went into a product.
        num_keys: Number of things that are weighed; 0 if unknown.
    """

    time: int
    call: Call
    many_queries: bool
    applied: bool = True
    num_keys: int = 0
    is_single: bool = False

    def is_over_tokens(self, call: Call) -> bool:
        """Return whether it weighs tokens of what enters `call`, and not experts or branches."""
        return self.applied or (call.input is not None and self.num_keys in call.input.shape[1:])


@dataclass(eq=False)
class Trace:
    """Everything recorded in one forward.

    Attributes:
        calls, attention_ops, additions: In the order of the forward.
        casts: A tensor, and the same values in another dtype, or added to 0.
        scalings: The products of tensors with numbers, or with one number for each channel.
        elementwise: What sums, products and casts returned, by identity, with their operands of the same shape.
        reshaped: What reshapes and copies returned, by identity, with what they took: the same values in order.
        functions: What norms and activations returned, by identity, with what they took.
        overwritten: Tensors that an activation has changed in place, by identity.
        products: When a parameter entered a matrix product, the innermost call around that, and the parameter's key.
        uses: For each parameter's key what it is in operations with other tensors (`Use`), with the first time of each.
        batch_size: Number of samples.
        outputs: All tensors that the model returned.
        draws_nothing: True if the forward was watched, and drew no random number.
        flow: What was computed from what.
    """

    calls: list[Call] = field(default_factory=list)
    attention_ops: list[AttentionOp] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    casts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    scalings: list[Scaling] = field(default_factory=list)
    elementwise: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict)
    reshaped: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    functions: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    overwritten: set[int] = field(default_factory=set)
    products: list[tuple[int, Call, str]] = field(default_factory=list)
    uses: dict[str, dict[str, int]] = field(default_factory=dict)
    batch_size: int = 0
    outputs: list[Tensor] = field(default_factory=list)
    draws_nothing: bool = False
    flow: Flow = field(default_factory=Flow)

    @property
    def root(self) -> Call:
        """The model's own call."""
        return self.calls[0]

    @property
    def model_name(self) -> str:
        """The model's class name."""
        return type(self.root.module).__name__

    def maker(self, tensor: Tensor | None) -> Call | None:
        """Return the innermost call that returned `tensor`, or None if no module did."""
        makers = [c for c in self.calls if tensor is not None and c.output is tensor]
        return max(makers, key=lambda c: c.start, default=None)
