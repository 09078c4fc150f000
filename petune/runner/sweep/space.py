"""What a sweep searches: values or a range by key, as `bottleneck=8,16,64` and `train.lr=1e-4..1e-2:log`."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import model_validator

from petune.base.config import Config
from petune.base.errors import ConfigError, MissingExtra
from petune.base.yaml_values import parse_value

Value = bool | int | float | str
Params = dict[str, Any]
ATTEMPTS = 30
"""How often the sampler is asked again after it proposed what was tried already."""


class Range(Config):
    """Numbers from `low` to `high`, both included; whole ones if both ends are whole; `log`: each decade alike."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"a range goes from the lower to the higher number, but it is {self.low}..{self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range lies above 0, but it begins at {self.low}")
        return self


Space = Mapping[str, Range | Sequence[Value]]


def parse_over(text: str) -> tuple[str, Range | tuple[Value, ...]]:
    """`bottleneck=8,16,64` → `("bottleneck", (8, 16, 64))`; `train.lr=1e-4..1e-2:log` → a Range.

    Raises:
        ConfigError: It is neither.
    """
    key, equals, right = (part.strip() for part in text.partition("="))
    if not (key and equals and all(word.strip() for word in right.split(","))):
        raise ConfigError(f"--search takes KEY=VALUE,VALUE,… or KEY=LOW..HIGH[:log] and no empty value; got {text!r}")
    ends = re.fullmatch(r"([^,]+?)\.\.([^,]+?)(:log)?", right)
    if ends:
        low, high = parse_value(ends[1]), parse_value(ends[2])
        if all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)):
            return key, Range.build({"low": low, "high": high, "log": bool(ends[3])}, f"--search {text}")
    return key, tuple(parse_value(word.strip()) for word in right.split(","))


def grid(space: Space) -> list[Params] | None:
    """Every combination, the last key fastest; None where a range has no end of values."""
    values = []
    for dimension in space.values():
        if isinstance(dimension, Range):
            return None
        values.append(list(dimension))
    return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*values)]


def corners(space: Space) -> list[Params]:
    """Few combinations in which every value, and both ends of every range, stand once at least."""
    ends = {k: [d.low, d.high] if isinstance(d, Range) else list(d) for k, d in space.items()}
    count = max(map(len, ends.values()))
    return [{key: values[min(number, len(values) - 1)] for key, values in ends.items()} for number in range(count)]


def within(inner: Space, outer: Space) -> bool:
    """Whether `outer` has the same keys, and for each at least the values of `inner`."""
    return inner.keys() == outer.keys() and all(_covers(outer[key], dimension) for key, dimension in inner.items())


def _covers(outer: Range | Sequence[Value], inner: Range | Sequence[Value]) -> bool:
    if isinstance(inner, Range):
        if not isinstance(outer, Range) or (outer.log, _whole(outer)) != (inner.log, _whole(inner)):
            return False
        return outer.low <= inner.low and inner.high <= outer.high
    if isinstance(outer, Range):
        return False
    return set(map(repr, inner)) <= set(map(repr, outer))


def is_whole(space: Space, trials: int) -> bool:
    """Whether `trials` are enough for every combination."""
    every = grid(space)
    return every is not None and len(every) <= trials


def most(space: Space, trials: int) -> int:
    """How many trials there can be: `trials`, or every combination where these are fewer."""
    every = grid(space)
    return trials if every is None else min(trials, len(every))


def propose(
    space: Space,
    tried: Sequence[tuple[Params, float | None]],
    trials: int,
    seed: int,
    pending: Sequence[Params] = (),
) -> Params | None:
    """What to try next, never the same twice: the whole grid where `trials` are enough for it, else by optuna's TPE.

    What comes depends on the arguments only, so a sweep that was cut off goes on as it would have.

    Args:
        space: What to search.
        tried: Parameters so far with their value (higher is better), None for one that failed.
        trials: How many there will be in all.
        seed: Of the sampler.
        pending: Parameters that are tried, whose value is not known; the sampler keeps away from them.

    Returns:
        None where everything has been tried.

    Raises:
        MissingExtra: optuna is needed and not installed.
    """
    known = [*(params for params, _ in tried), *pending]
    every = grid(space)
    if every is not None and (len(every) <= trials or len(known) >= len(every)):
        return next((params for params in every if params not in known), None)
    for attempt in range(ATTEMPTS):
        params = _sampled(space, tried, pending, seed + 1000 * len(known) + 1_000_003 * attempt)
        if params not in known:
            return params
    return next((params for params in every or () if params not in known), None)


def require_sampler(space: Space, trials: int) -> None:
    """Say before the first trial whether optuna will be needed.

    Raises:
        MissingExtra: It will, and is not installed.
    """
    if not is_whole(space, trials):
        _optuna()


def _sampled(
    space: Space, tried: Sequence[tuple[Params, float | None]], pending: Sequence[Params], seed: int
) -> Params:
    optuna = _optuna()
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=bool(pending))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {key: _distribution(optuna, dimension) for key, dimension in space.items()}
    for params, value in tried:
        failed = value is None or not math.isfinite(value)
        state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=distributions, value=None if failed else value, state=state
            )
        )
    for params in pending:
        state = optuna.trial.TrialState.RUNNING
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, state=state))
    asked = study.ask(distributions)
    return {key: _rounded(asked.params[key], dimension) for key, dimension in space.items()}


def _rounded(value: Any, dimension: Range | Sequence[Value]) -> Any:
    """A sampled number as one reads it: four digits are more than any of these is known to, but in a narrow range."""
    if not isinstance(value, float) or not isinstance(dimension, Range):
        return value
    rounded = float(f"{value:.4g}")
    return rounded if dimension.low <= rounded <= dimension.high else value


def _distribution(optuna: Any, dimension: Range | Sequence[Value]) -> Any:
    if not isinstance(dimension, Range):
        return optuna.distributions.CategoricalDistribution(list(dimension))
    kind = optuna.distributions.IntDistribution if _whole(dimension) else optuna.distributions.FloatDistribution
    return kind(dimension.low, dimension.high, log=dimension.log)


def _whole(dimension: Range) -> bool:
    return isinstance(dimension.low, int) and isinstance(dimension.high, int)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MissingExtra("a sweep over more than a grid that --trials covers", "sweep") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
