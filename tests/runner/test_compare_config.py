"""What the runs of a comparison share, and what it says for each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import petune


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        ({"seed": 3}, "seed is 3, and a comparison runs its seeds: 0"),
        ({"output": Path("there")}, "Set the output of the comparison"),
    ],
)
def test_what_a_comparison_says_for_each_run_is_not_an_option_of_all(run: dict[str, Any], problem: str) -> None:
    """They had no effect, and nothing said so."""
    with pytest.raises(petune.ConfigError, match=problem):
        petune.compare(methods=("linear", "vpt"), run=run)


def test_a_run_of_the_comparison_may_be_what_all_share() -> None:
    config = petune.CompareConfig.build({"methods": ("linear", "vpt"), "seeds": (2, 3), "run": {"seed": 3}})
    assert [run.seed for run in config.runs()] == [2, 3, 2, 3]
