"""The search space of a sweep: read from text, as a grid, at its corners."""

from __future__ import annotations

from typing import Any

import pytest

from petune.base.errors import ConfigError
from petune.runner.sweep.space import Range, contains, corners, grid, parse_search


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bottleneck=8,16", ("bottleneck", (8, 16))),
        ("deep=true,false", ("deep", (True, False))),
        ("variant=paddle_study", ("variant", ("paddle_study",))),
        ("train.lr=1e-4..1e-2:log", ("train.lr", Range(low=1e-4, high=1e-2, log=True))),
        ("r=1..8", ("r", Range(low=1, high=8))),
        ("file=../a,../b", ("file", ("../a", "../b"))),
    ],
)
def test_text_is_read_with_its_types(text: str, expected: Any) -> None:
    key, dimension = parse_search(text)
    assert (key, dimension) == expected
    if isinstance(dimension, Range):
        assert type(dimension.low) is type(expected[1].low)
    else:
        assert [type(value) for value in dimension] == [type(value) for value in expected[1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bottleneck", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("a=1,,2", "KEY=VALUE"),
        ("r=8..1", "empty"),
        ("train.lr=1e-3..", "train.lr=LOW..HIGH"),
        ("train.lr=..1e-2:log", "LOW..HIGH"),
        ("r=1..b", "LOW..HIGH"),
        ("r=1..8:lgo", "LOW..HIGH"),
        ("train.lr=0..1:log", "above 0"),
    ],
)
def test_malformed_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_search(text)


def test_a_grid_has_every_combination_and_a_range_has_no_grid() -> None:
    assert grid({"a": (1, 2), "b": ("x", "y")}) == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    ]  # fmt: skip
    assert grid({"a": (1, 2), "r": Range(low=0.1, high=0.2)}) is None


def test_corners_contain_every_value_and_both_ends() -> None:
    assert corners({"a": (1, 2, 3), "r": Range(low=0.1, high=0.2)}) == [
        {"a": 1, "r": 0.1}, {"a": 2, "r": 0.2}, {"a": 3, "r": 0.2},
    ]  # fmt: skip


def test_a_space_contains_the_points_with_its_keys_and_values() -> None:
    space = {"lr": Range(low=0.1, high=0.2), "a": (1, 2)}
    assert contains(space, {"a": 2, "lr": 0.2})
    for params in ({"a": 1}, {"a": 1, "lr": 0.3}, {"a": 3, "lr": 0.1}, {"a": True, "lr": 0.1}, {"a": 1, "lr": "x"}):
        assert not contains(space, params)
    assert not contains(space, {"a": 1, "lr": 0.1, "b": 1})
