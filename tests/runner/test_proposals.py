"""What a sweep tries next: a small grid in order, anything else sampled, never the same twice."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from petune.base.errors import MissingExtra
from petune.runner.sweep.proposals import num_trials, propose, require_sampler
from petune.runner.sweep.space import Range, grid

Tried = list[tuple[dict[str, Any], float | None]]
LR = Range(low=1e-4, high=1.0, log=True)


def test_a_full_grid_is_tried_in_order_and_then_ends() -> None:
    space = {"a": (1, 2), "b": ("x", "y", "z")}
    tried: Tried = []
    while (params := propose(space, tried, trials=6, seed=0)) is not None:
        tried.append((params, None if len(tried) == 2 else 50.0))
    assert [params for params, _ in tried] == grid(space)
    assert (num_trials(space, 20), num_trials(space, 4), num_trials({"lr": LR}, 20)) == (6, 4, 20)


def test_samples_depend_on_the_history_alone_never_repeat_and_find_the_better_side() -> None:
    pytest.importorskip("optuna")
    space = {"train.lr": LR, "r": Range(low=1, high=4), "deep": (True, False)}
    tried: Tried = []
    for _ in range(30):
        params = propose(space, tried, trials=30, seed=3)
        assert params is not None
        assert params == propose(space, tried, trials=30, seed=3)
        assert params not in [earlier for earlier, _ in tried]
        assert 1e-4 <= params["train.lr"] <= 1
        assert type(params["r"]) is int
        assert params["r"] in range(1, 5)
        tried.append((params, None if len(tried) == 1 else 80 - abs(params["train.lr"] - 0.01) * 100))
    assert propose(space, [], trials=30, seed=4) != tried[0][0]
    best = max((value, params["train.lr"]) for params, value in tried if value is not None)
    assert abs(best[1] - 0.01) < 0.005


def test_a_grid_larger_than_the_number_of_trials_is_sampled_without_repeats() -> None:
    pytest.importorskip("optuna")
    space = {"a": (1, 2, 3, 4)}
    tried: Tried = []
    for _ in range(3):
        params = propose(space, tried, trials=3, seed=0)
        assert params is not None
        tried.append((params, float(params["a"])))
    assert len({params["a"] for params, _ in tried}) == 3
    tried += [({"a": a}, 0.0) for a in space["a"] if {"a": a} not in [params for params, _ in tried]]
    assert propose(space, tried, trials=3, seed=0) is None


def test_without_optuna_only_full_grids_work(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_optuna(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("optuna"):
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_optuna)
    require_sampler({"a": (1, 2)}, 2)
    assert propose({"a": (1, 2)}, [], 2, 0) == {"a": 1}
    for space in ({"a": (1, 2, 3)}, {"lr": Range(low=0.1, high=0.2)}):
        with pytest.raises(MissingExtra, match=r"petune\[sweep\]"):
            require_sampler(space, 2)


def test_a_batch_has_no_repeats_and_covers_a_small_grid() -> None:
    pytest.importorskip("optuna")
    space = {"train.lr": LR, "r": Range(low=1, high=2)}
    tried: Tried = [({"train.lr": 10.0 ** (-number / 4), "r": 1 + number % 2}, 80.0 - number) for number in range(12)]
    batch: list[dict[str, Any]] = []
    while len(batch) < 6:
        params = propose(space, tried, 30, 0, batch)
        assert params == propose(space, tried, 30, 0, batch)
        assert params is not None
        assert params not in batch
        batch.append(params)
    small = {"deep": (True, False), "r": (1, 2)}
    pending: list[dict[str, Any]] = []
    while (params := propose(small, [], 3, 0, pending)) is not None:
        pending.append(params)
    assert sorted(map(str, pending)) == sorted(map(str, grid(small) or ()))


def test_a_rounded_number_stays_in_its_range() -> None:
    pytest.importorskip("optuna")
    space = {"scale": Range(low=0.123456, high=0.123499)}
    tried: Tried = []
    for _ in range(3):
        params = propose(space, tried, 5, 0)
        assert params is not None
        assert 0.123456 <= params["scale"] <= 0.123499
        tried.append((params, 1.0))
