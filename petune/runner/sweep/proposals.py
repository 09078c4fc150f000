"""Which parameters a sweep tries next: a small grid in order, anything else sampled by optuna's TPE."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from petune.base.errors import MissingExtra
from petune.runner.sweep.space import Params, Range, Space, Value, grid

MAX_REPEATS = 30
"""Maximum number of new proposals after the sampler repeats a trial."""


def num_trials(space: Space, trials: int) -> int:
    """Return how many trials there can be: `trials`, or every combination if those are fewer."""
    combinations = grid(space)
    return trials if combinations is None else min(trials, len(combinations))


def is_full_grid(space: Space, trials: int) -> bool:
    """Return true if `trials` are enough for every combination."""
    combinations = grid(space)
    return combinations is not None and len(combinations) <= trials


def require_sampler(space: Space, trials: int) -> None:
    """Check before the first trial that optuna is installed, if it will be needed.

    Raises:
        MissingExtra: It is needed and not installed.
    """
    if not is_full_grid(space, trials):
        _optuna()


def propose(
    space: Space,
    tried: Sequence[tuple[Params, float | None]],
    trials: int,
    seed: int,
    pending: Sequence[Params] = (),
) -> Params | None:
    """Return the parameters of the next trial, never the same twice; None if everything was tried.

    The result depends on the arguments alone, so an interrupted sweep continues as it would have.

    Args:
        space: What to search.
        tried: Parameters so far and their value (higher is better), None for a trial that failed.
        trials: The number of trials planned in all.
        seed: Seed of the sampler.
        pending: Parameters of trials without a value yet; the sampler keeps away from them.

    Raises:
        MissingExtra: optuna is needed and not installed.
    """
    known = [*(params for params, _ in tried), *pending]
    untried = (params for params in grid(space) or () if params not in known)
    if is_full_grid(space, trials):
        return next(untried, None)
    for repeat in range(MAX_REPEATS):
        params = _sample(space, tried, pending, seed + 1000 * len(known) + 1_000_003 * repeat)
        if params not in known:
            return params
    return next(untried, None)


def _sample(space: Space, tried: Sequence[tuple[Params, float | None]], pending: Sequence[Params], seed: int) -> Params:
    """Ask a fresh study that knows all trials; optuna's storages lose the state of the random generator."""
    optuna = _optuna()
    states = optuna.trial.TrialState
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=bool(pending))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions = {key: _distribution(optuna, dimension) for key, dimension in space.items()}

    def add(params: Params, state: Any, value: float | None = None) -> None:
        trial = optuna.trial.create_trial(params=params, distributions=distributions, value=value, state=state)
        study.add_trial(trial)

    for params, value in tried:
        if value is None or not math.isfinite(value):
            add(params, states.FAIL)
        else:
            add(params, states.COMPLETE, value)
    for params in pending:
        add(params, states.RUNNING)
    params = study.ask(distributions).params
    return {key: _rounded(params[key], dimension) for key, dimension in space.items()}


def _rounded(value: Any, dimension: Range | Sequence[Value]) -> Any:
    """Round a sampled number to four digits, unless that leaves its range."""
    if not isinstance(value, float) or not isinstance(dimension, Range):
        return value
    rounded = float(f"{value:.4g}")
    return rounded if dimension.low <= rounded <= dimension.high else value


def _distribution(optuna: Any, dimension: Range | Sequence[Value]) -> Any:
    distributions = optuna.distributions
    if not isinstance(dimension, Range):
        return distributions.CategoricalDistribution(list(dimension))
    kind = distributions.IntDistribution if dimension.is_whole else distributions.FloatDistribution
    return kind(dimension.low, dimension.high, log=dimension.log)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MissingExtra("a sweep other than a grid with no more combinations than trials", "sweep") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
