"""Training options: ranges, names, warm-up."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from petune.base.errors import ConfigError
from petune.training.config import TrainConfig


@pytest.mark.parametrize(
    "values",
    [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": -1.0}, {"weight_decay": -0.1},
     {"label_smoothing": 1.0}, {"mixup": -1.0}, {"schedule": "linear"},
     {"augment": "all"}, {"precision": "fp16"},
     {"grad_clip": 0.0}, {"warmup": -1.0}, {"log_every": 0}, {"epoch": 3}],
)  # fmt: skip
def test_invalid_values_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.build(values)
    assert [problem.key for problem in caught.value.problems] == list(values)


def test_optimizers_have_the_names_of_timm() -> None:
    assert TrainConfig(optimizer="nmuon").optimizer == "nmuon"
    with pytest.raises(ConfigError, match=r"optimizer: timm has no such optimizer. Did you mean .*adamw"):
        TrainConfig.build({"optimizer": "adamww"})


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [(0.1, 100, 10), (0.0, 100, 0), (2000.0, 10_000, 2000), (2000.0, 100, 99), (0.5, 1, 0)],
)
def test_warmup_is_a_fraction_below_one_and_a_number_of_steps_from_one(warmup: float, total: int, steps: int) -> None:
    assert TrainConfig(warmup=warmup).warmup_steps(total) == steps


@given(st.floats(0, 1e6), st.integers(1, 10**6))
def test_warmup_leaves_at_least_one_step(warmup: float, total: int) -> None:
    assert 0 <= TrainConfig(warmup=warmup).warmup_steps(total) < total
