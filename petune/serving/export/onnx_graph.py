"""Write an ONNX graph as arithmetic on values: `(x + 0.5) * scale` adds the nodes that compute it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

PREFIX = "preprocessing/"
"""Of all names, so that the graph can be joined to another one."""


class Graph:
    """The nodes and constants of a graph that is being written.

    ONNX converts no types: a Python integer is an int64, a float is a float64, and an array keeps its type.
    """

    def __init__(self) -> None:
        """Start an empty graph."""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def value(self, name: str) -> Value:
        """Return the value of an input of the graph."""
        return Value(self, name)

    def constant(self, array: NDArray[Any]) -> Value:
        """Add a constant of the array's type."""
        from onnx import numpy_helper

        name = f"{PREFIX}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return Value(self, name)

    def node(self, kind: str, *operands: Value | float | NDArray[Any], **attributes: Any) -> Value:
        """Add a node of an operator of ONNX, and return its output."""
        from onnx import helper

        inputs = [self._value_of(operand).name for operand in operands]
        output = f"{PREFIX}{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return Value(self, output)

    def where(self, condition: Value, yes: Value | float, no: Value | float) -> Value:
        """Return `yes` where the condition holds, else `no`."""
        return self.node("Where", condition, yes, no)

    def arange(self, stop: Value | int) -> Value:
        """Return 0, 1, … up to `stop`, as int64."""
        return self.node("Range", 0, stop, 1)

    def _value_of(self, operand: Value | float | NDArray[Any]) -> Value:
        if isinstance(operand, Value):
            return operand
        if isinstance(operand, np.ndarray):
            return self.constant(operand)
        return self.constant(np.array(operand, np.int64 if isinstance(operand, int) else np.float64))


class Value:
    """An array that a graph computes."""

    def __init__(self, graph: Graph, name: str) -> None:
        """Refer to an input, a constant or an output of a node."""
        self.graph, self.name = graph, name

    def __add__(self, other: Value | float | NDArray[Any]) -> Value:
        return self.graph.node("Add", self, other)

    def __sub__(self, other: Value | float | NDArray[Any]) -> Value:
        return self.graph.node("Sub", self, other)

    def __mul__(self, other: Value | float | NDArray[Any]) -> Value:
        return self.graph.node("Mul", self, other)

    def __truediv__(self, other: Value | float | NDArray[Any]) -> Value:
        """Divide; integers are divided towards zero."""
        return self.graph.node("Div", self, other)

    def __matmul__(self, other: Value) -> Value:
        return self.graph.node("MatMul", self, other)

    def __lt__(self, other: Value | float) -> Value:
        return self.graph.node("Less", self, other)

    def __and__(self, other: Value) -> Value:
        return self.graph.node("And", self, other)

    def minimum(self, other: Value | float) -> Value:
        """Return the smaller of both."""
        return self.graph.node("Min", self, other)

    def maximum(self, other: Value | float) -> Value:
        """Return the larger of both."""
        return self.graph.node("Max", self, other)

    def clip(self, low: float | NDArray[Any], high: float | NDArray[Any]) -> Value:
        """Limit to a range."""
        return self.graph.node("Clip", self, low, high)

    def floor(self) -> Value:
        """Return the next lower whole numbers."""
        return self.graph.node("Floor", self)

    def to(self, dtype: type[np.generic]) -> Value:
        """Convert to a type; floats are truncated to integers."""
        from onnx import helper

        return self.graph.node("Cast", self, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def sum(self, *axes: int, keepdims: bool = False) -> Value:
        """Return the sum over axes."""
        return self.graph.node("ReduceSum", self, np.array(axes, np.int64), keepdims=int(keepdims))

    def transpose(self, *axes: int) -> Value:
        """Reorder the axes."""
        return self.graph.node("Transpose", self, perm=list(axes))

    def reshape(self, *shape: Value | int) -> Value:
        """Reshape; sizes may be computed."""
        sizes = [self.graph.node("Reshape", size, np.array([1], np.int64)) for size in shape]
        return self.graph.node("Reshape", self, self.graph.node("Concat", *sizes, axis=0))
