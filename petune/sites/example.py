"""From an example of a model's inputs to what its forward takes: how it is called, and where its samples are."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from petune.base.errors import AttachError
from petune.base.text import shortened
from petune.sites.forward import device_of, dtype_of, forward_of, meta_output
from petune.sites.input_spec import Inputs, InputSpec
from petune.sites.returned import logits_in, tensors_returned
from petune.sites.tensor_spec import TensorSpec

CONSTANTS = (bool, int, float, str, type(None))
"""Types of arguments that are passed on as they are."""


def spec_of_example(model: nn.Module, example: Any) -> InputSpec:
    """Return what a forward takes that runs on an example.

    The model runs once on the example; then on two and on three samples like it, on the meta device if possible, which
    tells the dimension of the samples.

    Args:
        model: Nothing about it changes.
        example: A tensor, a tuple of arguments, a dict, or `(args, kwargs)`.

    Raises:
        AttachError: The example holds something else, the forward fails on it, or it runs on no other number of
            samples.
    """
    readings = _readings(model, example)
    _check_leaves(readings[0])
    _check_not_packed(readings[0])
    inputs = _first_that_runs(model, readings)
    failure: Exception | None = None
    running: list[InputSpec] = []
    for spec in _candidates(inputs):
        try:
            two, three = (_output_shape(model, spec, count) for count in (2, 3))
        except Exception as error:  # whatever the model's own code raises on another number of samples
            failure = failure or error
            continue
        if len(two) == len(three) and any(a * 3 == b * 2 and a for a, b in zip(two, three, strict=True)):
            return spec
        running.append(spec)  # an output without a row for each sample, such as a loss
    if running:
        return running[0]
    raise AttachError(
        f"{type(model).__name__} runs on the example, but not on two and three samples like it "
        f"({type(failure).__name__}: {failure}). petune looks at a model with several batch sizes. Let its forward "
        "take any, and pass as example only tensors that it takes in a call of one sample"
    ) from failure


def _readings(model: nn.Module, example: Any) -> list[Inputs]:
    """Return the calls that an example can stand for, the likeliest first."""
    if isinstance(example, Mapping):  # some models take a dict as their only argument (timm's NaFlexViT)
        calls = [Inputs((dict(example),))]
        if all(isinstance(name, str) for name in example):
            calls.insert(0, Inputs((), dict(example)))
    elif isinstance(example, tuple) and example:
        calls = [Inputs(example)]
        if len(example) == 2 and isinstance(example[0], tuple | list) and isinstance(example[1], Mapping):
            calls.insert(0, Inputs(tuple(example[0]), dict(example[1])))
    else:
        calls = [Inputs((example,))]
    return [call for call in calls if _binds(model, call)] or calls


def _binds(model: nn.Module, call: Inputs) -> bool:
    try:
        inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):
        return False
    return True


def _check_leaves(inputs: Inputs) -> None:
    """Check that an example holds plain tensors, and nothing else that cannot be saved."""
    others = [type(x).__name__ for x in inputs.leaves if not isinstance(x, (Tensor, *CONSTANTS))]
    kinds = [str(x.layout) for x in inputs.tensors if x.is_nested or x.layout is not torch.strided]
    if others or kinds or not inputs.tensors:
        problem = f"holds {others[0]}" if others else f"holds a {kinds[0]} tensor" if kinds else "holds no tensor"
        raise AttachError(
            f"example {problem}. Give what the model takes: a tensor, a tuple of arguments, a dict of named arguments, "
            "or (args, kwargs), with plain tensors inside"
        )
    content = _by_content(inputs)[0]
    if not content.numel():
        shape = "x".join(map(str, content.shape))
        raise AttachError(f"example holds no sample: its tensor is empty ({shape}). Give one sample or more")


def _first_that_runs(model: nn.Module, readings: list[Inputs]) -> Inputs:
    errors: list[Exception] = []
    for inputs in readings:
        try:
            forward_of(model, inputs)
        except Exception as error:  # whatever the model's own code raises
            errors.append(error)
        else:
            return inputs
    shapes = ", ".join("x".join(map(str, x.shape)) for x in readings[0].tensors)
    raise AttachError(
        f"the forward of {type(model).__name__} fails on the example ({shapes}): {type(errors[0]).__name__}: "
        f"{errors[0]}. Pass what the model takes: if model(x) works, example=x; if model(**inputs), example=inputs; "
        "else example=(args, kwargs)"
    ) from errors[0]


def _candidates(inputs: Inputs) -> Iterator[InputSpec]:
    """Yield the ways in which the tensors may hold samples, the likeliest first.

    Samples are along the first dimension, of tensors of as many rows as the first one with content; or the example is
    one sample, whose rows are not samples (packed sequences); or samples are along the second dimension.
    """
    tensors = _by_content(inputs)
    seen: list[InputSpec] = []
    for dim in (0, 1):
        count = next((x.shape[dim] for x in tensors if x.ndim > dim), 0)
        specs = [_spec(inputs, dim, count, only_sized=True)] if count else []
        if dim == 0 and tensors:
            specs.append(_spec(inputs, 0, 1, only_sized=False))
        for spec in specs:
            if spec not in seen:
                seen.append(spec)
                yield spec


def _check_not_packed(inputs: Inputs) -> None:
    """Check that no tensor says where in one row of tokens the samples start and end (`cu_seqlens`).

    Samples put together would need others, and with those of the example they are cut at wrong places, even where the
    forward runs.
    """
    floating = [x for x in inputs.tensors if x.is_floating_point() and x.ndim in (2, 3)]
    rows = {len(x) for x in floating} | {x.shape[1] for x in floating if len(x) == 1}
    whole = [x for x in inputs.tensors if x.dtype in (torch.int32, torch.int64) and x.ndim == 1 and not x.is_meta]
    for x in whole:
        ends = x.tolist() if 2 <= len(x) < max(rows, default=0) else []
        is_increasing = all(a < b for a, b in itertools.pairwise(ends))
        if ends and ends[0] == 0 and ends[-1] in rows and is_increasing:
            raise AttachError(
                f"example packs its samples into one row of {ends[-1]} tokens, with the positions where they start and "
                f"end ({shortened([*map(str, ends)], 4)}), which petune cannot make for "
                "other numbers of samples. Put the model into a module whose forward takes the length of each sample "
                "and calls it with torch.nn.functional.pad(lengths.cumsum(0), (1, 0)); the example is then one sample, "
                "with a tensor of its length"
            )


def _by_content(inputs: Inputs) -> list[Tensor]:
    """Return all tensors, those with content first: floating-point numbers."""
    return sorted(inputs.tensors, key=lambda x: not x.is_floating_point())


def _spec(inputs: Inputs, dim: int, count: int, *, only_sized: bool) -> InputSpec:
    """Return the spec of `count` samples along a dimension: of tensors with that size there, or of all."""

    def describe(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        has_samples = leaf.ndim > dim and (leaf.shape[dim] == count or not only_sized)
        return TensorSpec.of(leaf, dim if has_samples else None, count, is_mask=_is_mask(leaf, inputs))

    return InputSpec(*inputs.map_leaves(describe))


def _is_mask(tensor: Tensor, inputs: Inputs) -> bool:
    """Return whether a tensor is a mask: one or two different numbers, and smaller than another tensor of numbers."""
    floating = [x for x in inputs.tensors if x.is_floating_point()]
    is_largest = tensor is max(floating, key=lambda x: x.numel(), default=None)
    if not tensor.is_floating_point() or is_largest or tensor.is_meta or not tensor.numel():
        return False
    return bool(((tensor == tensor.min()) | (tensor == tensor.max())).all())


def _output_shape(model: nn.Module, spec: InputSpec, num_samples: int) -> tuple[int, ...]:
    try:
        output = meta_output(model, spec, num_samples)
    except Exception:  # see `dry_forward`
        inputs = spec.zeros(num_samples)
        output = forward_of(model, inputs.to(device_of(model), dtype_of(model)))
    first = next(tensors_returned(logits_in(output)), None)
    return () if first is None else tuple(first.shape)
