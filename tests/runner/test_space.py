"""What a sweep searches: read from words, tried whole where it is a small grid, never the same twice."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from petune.base.errors import ConfigError, MissingExtra
from petune.runner.sweep.space import Range, corners, grid, parse_over, propose, require_sampler, within


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("bottleneck=8,16", ("bottleneck", (8, 16))),
        ("deep=true,false", ("deep", (True, False))),
        ("variant=paddle_study", ("variant", ("paddle_study",))),
        ("train.lr=1e-4..1e-2:log", ("train.lr", Range(low=1e-4, high=1e-2, log=True))),
        ("r=1..8", ("r", Range(low=1, high=8))),
        ("file=../a,../b", ("file", ("../a", "../b"))),
    ],
)
def test_words_are_read(text: str, read: Any) -> None:
    key, dimension = parse_over(text)
    assert (key, dimension) == read
    kinds = (type(dimension.low) if isinstance(dimension, Range) else type(dimension[0]), type(read[1]))
    assert kinds[1] is type(dimension)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bottleneck", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("r=8..1", "from the lower to the higher"),
        ("train.lr=0..1:log", "a log range lies above 0"),
    ],
)
def test_other_words_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_over(text)


def test_a_grid_is_tried_whole_in_its_order_and_then_ends() -> None:
    space = {"a": (1, 2), "b": ("x", "y", "z")}
    tried: list[tuple[dict[str, Any], float | None]] = []
    while (params := propose(space, tried, trials=6, seed=0)) is not None:
        tried.append((params, None if len(tried) == 2 else 50.0))
    assert [params for params, _ in tried] == grid(space)
    assert len(tried) == 6


def test_a_space_is_within_a_wider_one_of_the_same_keys() -> None:
    lr = Range(low=0.1, high=0.2)
    assert within({"lr": lr, "a": (1, 2)}, {"lr": Range(low=0.1, high=0.3), "a": (2, 1, 3)})
    assert not within({"lr": lr}, {"lr": Range(low=0.15, high=0.3)})
    assert not within({"lr": lr}, {"lr": (0.1, 0.2)})
    assert not within({"lr": (0.1, 0.2)}, {"lr": lr})
    assert not within({"a": (1, 2)}, {"a": (1, 3)})
    assert not within({"a": (1,)}, {"a": (True,)})
    assert not within({"a": (1,)}, {"a": (1,), "b": (1,)})


def test_corners_hold_every_value_and_both_ends() -> None:
    found = corners({"a": (1, 2, 3), "r": Range(low=0.1, high=0.2)})
    assert found == [{"a": 1, "r": 0.1}, {"a": 2, "r": 0.2}, {"a": 3, "r": 0.2}]


def test_sampling_depends_on_the_history_alone_repeats_nothing_and_finds_the_better_side() -> None:
    pytest.importorskip("optuna")
    space = {"train.lr": Range(low=1e-4, high=1.0, log=True), "r": Range(low=1, high=4), "deep": (True, False)}
    tried: list[tuple[dict[str, Any], float | None]] = []
    for _ in range(30):
        params = propose(space, tried, trials=30, seed=3)
        assert params is not None
        assert params == propose(space, tried, trials=30, seed=3)
        assert params not in [p for p, _ in tried]
        assert 1e-4 <= params["train.lr"] <= 1
        assert type(params["r"]) is int
        assert params["r"] in range(1, 5)
        tried.append((params, None if len(tried) == 1 else 80 - abs(params["train.lr"] - 0.01) * 100))
    assert propose(space, [], trials=30, seed=4) != tried[0][0]
    best = max((value, params["train.lr"]) for params, value in tried if value is not None)
    assert abs(best[1] - 0.01) < 0.005


def test_a_grid_with_too_few_trials_is_sampled_without_repeats_up_to_its_end() -> None:
    pytest.importorskip("optuna")
    space = {"a": (1, 2, 3, 4)}
    tried: list[tuple[dict[str, Any], float | None]] = []
    for _ in range(3):
        params = propose(space, tried, trials=3, seed=0)
        assert params is not None
        tried.append((params, float(params["a"])))
    assert len({params["a"] for params, _ in tried}) == 3
    tried += [({"a": a}, 0.0) for a in space["a"] if {"a": a} not in [p for p, _ in tried]]
    assert propose(space, tried, trials=3, seed=0) is None


def test_without_optuna_only_grids_run(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("optuna"):
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    require_sampler({"a": (1, 2)}, 2)
    assert propose({"a": (1, 2)}, [], 2, 0) == {"a": 1}
    for space in ({"a": (1, 2, 3)}, {"lr": Range(low=0.1, high=0.2)}):
        with pytest.raises(MissingExtra, match=r"petune\[sweep\]"):
            require_sampler(space, 2)


def test_a_batch_holds_nothing_twice_and_keeps_away_from_what_is_pending() -> None:
    pytest.importorskip("optuna")
    space = {"train.lr": Range(low=1e-4, high=1.0, log=True), "r": Range(low=1, high=2)}
    tried = [({"train.lr": 10.0 ** (-number / 4), "r": 1 + number % 2}, 80.0 - number) for number in range(12)]
    batch: list[dict[str, Any]] = []
    while len(batch) < 6:
        params = propose(space, tried, 30, 0, batch)
        assert params == propose(space, tried, 30, 0, batch)
        assert params is not None
        assert params not in batch
        batch.append(params)
    few = {"deep": (True, False), "r": (1, 2)}
    pending: list[dict[str, Any]] = []
    while (params := propose(few, [], 3, 0, pending)) is not None:
        pending.append(params)
    assert sorted(map(str, pending)) == sorted(map(str, grid(few) or ()))


def test_a_rounded_number_stays_in_its_range() -> None:
    pytest.importorskip("optuna")
    space = {"scale": Range(low=0.123456, high=0.123499)}
    tried: list[tuple[dict[str, Any], float | None]] = []
    for _ in range(3):
        params = propose(space, tried, 5, 0)
        assert params is not None
        assert 0.123456 <= params["scale"] <= 0.123499
        tried.append((params, 1.0))


def test_a_range_of_another_kind_is_not_a_wider_one() -> None:
    inner = {"scale": Range(low=1.0, high=2.0)}
    assert within(inner, {"scale": Range(low=0.5, high=3.0)})
    assert not within(inner, {"scale": Range(low=0.5, high=3.0, log=True)})
    assert not within({"scale": Range(low=0.5, high=1.5)}, {"scale": Range(low=0, high=2)})
