"""The input of a model: one tensor, several, a dict. Made from a size, an example or an adapter's file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from petune.sites.tensor_spec import Fill, TensorSpec


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of a model.

    Attributes:
        args, kwargs: The arguments; tensors may be in nested tuples, lists and dicts.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def call(self, model: nn.Module) -> Any:
        """Return what the model returns."""
        return model(*self.args, **self.kwargs)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Inputs:
        """Return them on a device, floating-point tensors in a dtype."""
        return self.map(lambda x: x.to(device, dtype) if x.is_floating_point() else x.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Return them with each tensor changed."""
        return Inputs(*self.map_leaves(lambda x: change(x) if isinstance(x, Tensor) else x))

    def map_leaves(self, change: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return args and kwargs with each tensor and constant changed."""
        args, kwargs = _map_leaves((self.args, self.kwargs), change)
        return args, kwargs

    @property
    def leaves(self) -> list[Any]:
        """All tensors and constants, in order."""
        return list(_leaves((self.args, self.kwargs)))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class InputSpec:
    """The input of a model: arguments like those of `Inputs`, with a `TensorSpec` for each tensor.

    Attributes:
        args, kwargs: The arguments of one sample. Numbers, booleans, text and None are passed on as they are.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_size(cls, size: Sequence[int]) -> InputSpec:
        """Return that of a model that takes one tensor.

        Args:
            size: Of one sample: (channels, height, width), or with frames in the order that the model takes.
        """
        return cls((TensorSpec((1, *size)),))

    @property
    def tensors(self) -> list[TensorSpec]:
        """All tensors, in order."""
        return [leaf for leaf in _leaves((self.args, self.kwargs)) if isinstance(leaf, TensorSpec)]

    @property
    def size(self) -> tuple[int, ...]:
        """Size of one sample of the first tensor with content, without the batch: (channels, height, width)."""
        tensor = next((t for t in self.tensors if t.dtype is None and not t.values), self.tensors[0])
        return tuple(n for dim, n in enumerate(tensor.shape) if dim != tensor.batch_dim)

    @property
    def is_plain(self) -> bool:
        """True for one tensor of content, such as images or videos."""
        plain = len(self.args) == 1 and not self.kwargs and isinstance(self.args[0], TensorSpec)
        return plain and self.args[0] == TensorSpec((1, *self.args[0].shape[1:]))

    @property
    def is_image(self) -> bool:
        """True for one tensor of images (batch, channels, height, width)."""
        return self.is_plain and len(self.size) == 3

    def zeros(self, num_samples: int = 1, device: torch.device | str = "cpu") -> Inputs:
        """Return inputs whose content is zero: black images."""
        return self._inputs(num_samples, lambda shape: torch.zeros(shape, device=device), device)

    def noise(self, num_samples: int, seed: int = 0) -> Inputs:
        """Return inputs of normally distributed content, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        return self._inputs(num_samples, lambda shape: torch.randn(shape, generator=generator, device="cpu"))

    def synthetic(self, num_samples: int) -> Inputs:
        """Return inputs that follow a formula, because a generator's numbers may differ in a later PyTorch."""
        return self._inputs(num_samples, _formula)

    def inputs(self, x: Any) -> Inputs:
        """Return the arguments of a call with a batch, given in the form of the example that this spec was made of.

        Args:
            x: A tensor, a tuple of arguments, a dict, or `(args, kwargs)`.
        """
        if self.args and self.kwargs:
            return Inputs(tuple(x[0]), dict(x[1]))
        if self.kwargs:
            return Inputs((), dict(x))
        return Inputs((x,) if len(self.args) == 1 and not isinstance(x, tuple) else tuple(x))

    def num_samples_in(self, tensors: Sequence[Tensor]) -> int:
        """Return the batch size of a call with these tensors; 1 if all samples share all of them."""
        counts = (spec.num_samples_in(x) for spec, x in zip(self.tensors, tensors, strict=False))
        return next((count for count in counts if count is not None), 1)

    def select(self, inputs: Inputs, samples: list[int]) -> Inputs:
        """Return those samples of a batch, in that order, cut along the batch dimension of each tensor."""
        specs = iter(self.tensors)
        return inputs.map(lambda x: next(specs).select(x, samples))

    @property
    def text(self) -> str:
        """All sizes as text, for tables: 3x224x224."""
        if self.is_plain:
            return "x".join(map(str, self.size))
        named = [*(_text_of("", value) for value in self.args), *(_text_of(k, v) for k, v in self.kwargs.items())]
        return ", ".join(text for text in named if text)

    def __str__(self) -> str:
        return f"a {self.text} image" if self.is_image else f"an input of {self.text}"

    def to_json(self) -> Any:
        """Return this as plain data: a list of sizes for one tensor of content, else the arguments."""
        if self.is_plain:
            return list(self.size)
        return {"args": [_to_json(value) for value in self.args], "kwargs": _to_json(dict(self.kwargs))["dict"]}

    @property
    def key(self) -> str:
        """A text that is equal for equal ones."""
        return json.dumps(self.to_json())

    @property
    def form(self) -> Any:
        """Plain data that is equal for those with tensors of the same shapes and dtypes, whatever their values."""
        shapes = _map_leaves((self.args, self.kwargs), lambda x: str(x) if isinstance(x, TensorSpec) else x)
        return list(self.size) if self.is_plain else json.loads(json.dumps(shapes))

    @classmethod
    def from_json(cls, data: Any) -> InputSpec:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: It has another form.
        """
        if isinstance(data, list):
            return cls.of_size([int(size) for size in data])
        kwargs = {str(name): _from_json(value) for name, value in dict(data["kwargs"]).items()}
        return cls(tuple(_from_json(value) for value in data["args"]), kwargs)

    def _inputs(self, num_samples: int, fill: Fill, device: torch.device | str = "cpu") -> Inputs:
        def tensor(leaf: Any) -> Any:
            return leaf.batch(num_samples, fill).to(device) if isinstance(leaf, TensorSpec) else leaf

        return Inputs(*_map_leaves((self.args, self.kwargs), tensor))


def have_same_form(data: Any, other: Any) -> bool:
    """Return whether two specs as plain data are of tensors of the same shapes and dtypes, whatever their values."""
    try:
        return bool(InputSpec.from_json(data).form == InputSpec.from_json(other).form)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _formula(shape: tuple[int, ...]) -> Tensor:
    pixels = torch.arange(math.prod(shape), dtype=torch.float64, device="cpu")
    return torch.sin(pixels**2 / 10).reshape(shape)


def _map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: _map_leaves(item, change) for name, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_map_leaves(item, change) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return change(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _text_of(name: str, value: Any) -> str:
    """Return name and sizes of an argument; empty if it holds no tensor."""
    sizes = [str(leaf) for leaf in _leaves(value) if isinstance(leaf, TensorSpec)]
    return f"{name} {' + '.join(sizes)}".strip() if sizes else ""


def _to_json(value: Any) -> Any:
    if isinstance(value, TensorSpec):
        return {"tensor": value.to_json()}
    if isinstance(value, Mapping):
        return {"dict": {name: _to_json(item) for name, item in value.items()}}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_to_json(item) for item in value]}
    return value


def _from_json(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    (kind, content), *others = data.items()
    if others:
        raise ValueError(f"not one of tensor, dict, tuple, list: {list(data)}")
    if kind == "tensor":
        return TensorSpec.from_json(content)
    if kind == "dict":
        return {name: _from_json(item) for name, item in content.items()}
    return {"tuple": tuple, "list": list}[kind](_from_json(item) for item in content)
