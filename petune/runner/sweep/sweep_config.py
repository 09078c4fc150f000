"""The configuration of a sweep."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from petune.base.config import Config, UserPath
from petune.base.errors import ConfigError
from petune.base.yaml_values import override
from petune.injector.registry import build_tuner, parse_method
from petune.runner.recipes import complete_run
from petune.runner.run_config import RunConfig
from petune.runner.sweep.space import Params, Range, Value, corners
from petune.training.config import TrainConfig

TRAINING = "train."
"""Prefix of the keys that are training options."""


class SweepConfig(Config):
    """Configuration of a sweep.

    Attributes:
        search: Values or a Range (`low`, `high`, `log`) per key. `train.lr` etc. are training options; any other
            key is an option of the method.
        trials: The most trials; a grid with no more combinations is tried completely, in order.
        test: Test the best trial, once, when all are done. No other trial reads the test split.
        parallel_trials: Trials that are sampled before the results of any of them are known. None is what the sweep
            used before, otherwise 1 for the executor `serial` and 4 for others.
        run: What all trials share. Its seed also is the sampler's.
        output: The directory; None uses a name under `runs/`. Call again with the same one to resume, with more
            `trials` or a wider `search` if wanted.
    """

    search: dict[str, Range | tuple[Value, ...]] = Field(min_length=1)
    trials: int = Field(20, ge=1, le=10_000)
    test: bool = True
    parallel_trials: int | None = Field(None, ge=1)
    run: RunConfig = RunConfig()
    output: UserPath | None = None

    @field_validator("search")
    @classmethod
    def _values_are_different(cls, value: dict[str, Range | tuple[Value, ...]]) -> dict[str, Range | tuple[Value, ...]]:
        for key, dimension in value.items():
            if not isinstance(dimension, Range) and (not dimension or len(set(dimension)) < len(dimension)):
                raise ValueError(f"the values of {key} are missing or repeated: {list(dimension)}")
        return value

    @model_validator(mode="after")
    def _options_of_the_start_stay(self) -> Self:
        others = [key for key in self.search if not key.startswith(TRAINING)]
        if self.run.from_run is not None and others:
            raise ValueError(
                f"from_run keeps the options of its method, so {', '.join(others)} cannot be searched. Search options "
                "of the training, such as train.lr, or leave from_run out"
            )
        return self

    @model_validator(mode="after")
    def _trials_can_be_built(self) -> Self:
        for params in corners(self.search):
            self.trial(params)
        return self

    def completed(self) -> SweepConfig:
        """Return the configuration with what all trials take from their recipe and start; see `complete_run`."""
        return self.model_copy(update={"run": complete_run(self.run)})

    def trial(self, params: Params) -> RunConfig:
        """Return the run with these parameters.

        Raises:
            ConfigError: The method or the training does not accept them.
            UnknownName: No method has that name.
        """
        name, options = parse_method(self.run.method)
        options |= {key: value for key, value in params.items() if not key.startswith(TRAINING)}
        try:
            build_tuner(name, **options)
        except ConfigError as error:
            raise ConfigError(f"{error}{_training_hint(error)}", error.problems) from None
        text = ",".join(f"{key}={to_text(value)}" for key, value in options.items())
        assignments = [f"{key}={to_text(value)}" for key, value in params.items() if key.startswith(TRAINING)]
        values = override(self.run.model_dump(), assignments)
        return RunConfig.build(values | {"method": f"{name}:{text}" if text else name}, "a trial")


def to_text(value: Value | None) -> str:
    """Return the value as `parse_value` reads it back."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _training_hint(error: ConfigError) -> str:
    """Return advice if a training option was searched as an option of the method."""
    keys = [problem.key for problem in error.problems if problem.unknown and problem.key in TrainConfig.model_fields]
    return "".join(f"\n{key} is a training option. Write {TRAINING}{key}" for key in keys)
