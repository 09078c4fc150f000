"""The search space of a sweep: values or a range per key, as `bottleneck=8,16,64` and `train.lr=1e-4..1e-2:log`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import model_validator

from petune.base.config import Config
from petune.base.errors import ConfigError
from petune.base.yaml_values import parse_value

Value = bool | int | float | str
Params = dict[str, Any]
"""Values of one trial by key."""


class Range(Config):
    """Numbers from `low` to `high`, both included.

    Attributes:
        low, high: If both are whole, only whole numbers are tried.
        log: Sample the logarithm uniformly.
    """

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"the range {self.low}..{self.high} is empty. Write LOW..HIGH")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range starts above 0, not at {self.low}")
        return self

    @property
    def is_whole(self) -> bool:
        """True if only whole numbers are tried."""
        return isinstance(self.low, int) and isinstance(self.high, int)


Space = Mapping[str, Range | Sequence[Value]]


def parse_search(text: str) -> tuple[str, Range | tuple[Value, ...]]:
    """Read `bottleneck=8,16,64` as `("bottleneck", (8, 16, 64))`, and `train.lr=1e-4..1e-2:log` as a Range.

    Raises:
        ConfigError: It is neither, or a range lacks one of its two numbers.
    """
    key, equals, right = (part.strip() for part in text.partition("="))
    words = [word.strip() for word in right.split(",")]
    if not (key and equals and all(words)):
        raise ConfigError(f"not a search: {text!r}. Write KEY=VALUE,VALUE,… or KEY=LOW..HIGH[:log]")
    ends = re.fullmatch(r"([^,]+?)\.\.([^,]+?)(:log)?", right)
    if ends:
        low, high = parse_value(ends[1]), parse_value(ends[2])
        if type(low) in (int, float) and type(high) in (int, float):
            return key, Range.build({"low": low, "high": high, "log": bool(ends[3])}, text)
    if ".." in right and "/" not in right:
        raise ConfigError(f"not a range: {right!r}. Write {key}=LOW..HIGH or {key}=LOW..HIGH:log, with two numbers")
    return key, tuple(parse_value(word) for word in words)


def grid(space: Space) -> list[Params] | None:
    """Return every combination, the last key varying fastest; None if the space has a range."""
    if any(isinstance(dimension, Range) for dimension in space.values()):
        return None
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def corners(space: Space) -> list[Params]:
    """Return a few combinations that contain every value, and both ends of every range, at least once."""
    ends = {key: [d.low, d.high] if isinstance(d, Range) else list(d) for key, d in space.items()}
    count = max(map(len, ends.values()))
    return [{key: values[min(number, len(values) - 1)] for key, values in ends.items()} for number in range(count)]


def ends_of(dimension: Range | Sequence[Value]) -> tuple[float, float] | None:
    """Return the smallest and the largest number of a dimension; None if its values are no numbers, or all the same."""
    if isinstance(dimension, Range):
        return dimension.low, dimension.high
    numbers = [value for value in dimension if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < max(len(dimension), 2) or min(numbers) == max(numbers):
        return None
    return min(numbers), max(numbers)


def contains(space: Space, params: Params) -> bool:
    """Return true if `params` are a point of the space."""
    return space.keys() == params.keys() and all(_has(space[key], value) for key, value in params.items())


def _has(dimension: Range | Sequence[Value], value: Any) -> bool:
    if isinstance(dimension, Range):
        return isinstance(value, int | float) and dimension.low <= value <= dimension.high
    return any(type(each) is type(value) and each == value for each in dimension)
