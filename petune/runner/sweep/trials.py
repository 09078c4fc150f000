"""What a sweep asks for, and what it keeps of its trials: configuration, rows, table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from petune.base.config import Config, UserPath
from petune.base.errors import CheckpointError, ConfigError, DataError, HubError, PetuneError, WeightsUnavailable
from petune.base.files import replace_file
from petune.base.yaml_values import override
from petune.injector.registry import build_tuner, parse_method
from petune.runner.file_names import SWEEP_TABLE, TRIAL_FILE
from petune.runner.result import RunResult
from petune.runner.run_config import RunConfig
from petune.runner.sweep.space import Params, Range, Value, corners

TRAINING = "train."
NOT_OF_THE_TRIAL = {error.__name__ for error in (DataError, WeightsUnavailable, HubError, CheckpointError)}


class SweepConfig(Config):
    """What to search.

    Attributes:
        over: By key: values, or a Range (`low`, `high`, `log`). `train.lr` and the like are training options, every
            other key is an option of the method.
        trials: How many at most; a grid that has no more combinations is tried whole, in its order.
        test: Whether the best trial reads test when all are done; never before, and no other does.
        at_once: How many are sampled, and done, before the next are; a grid that is tried whole is not divided but
            by `serial`. None is what the sweep had before, else 1 with `serial` and 4 elsewhere.
        run: What all trials share: method, backbone, dataset, seed (also the sampler's) and the rest.
        output: The directory; None makes a name under `runs/`. Started again it goes on, with more trials or a wider
            `over` if these were changed.
    """

    over: dict[str, Range | tuple[Value, ...]] = Field(min_length=1)
    trials: int = Field(20, ge=1, le=10_000)
    test: bool = True
    at_once: int | None = Field(None, ge=1)
    run: RunConfig = RunConfig()
    output: UserPath | None = None

    @field_validator("over")
    @classmethod
    def _each_once(cls, value: dict[str, Range | tuple[Value, ...]]) -> dict[str, Range | tuple[Value, ...]]:
        for key, dimension in value.items():
            if not isinstance(dimension, Range) and (not dimension or len(set(dimension)) < len(dimension)):
                raise ValueError(f"{key} must have values, each once, but has {list(dimension)}")
        return value

    @model_validator(mode="after")
    def _trials_can_be_built(self) -> Self:
        for params in corners(self.over):
            try:
                self.trial(params)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self

    def trial(self, params: Params) -> RunConfig:
        """The run with these parameters.

        Raises:
            ConfigError: Method or training do not take them.
        """
        name, options = parse_method(self.run.method)
        options |= {key: value for key, value in params.items() if not key.startswith(TRAINING)}
        try:
            build_tuner(name, **options)
        except PetuneError as error:
            raise ConfigError(str(error)) from None
        text = ",".join(f"{key}={written(value)}" for key, value in options.items())
        values = override(
            self.run.model_dump(), [f"{key}={written(v)}" for key, v in params.items() if key.startswith(TRAINING)]
        )
        return RunConfig.build(values | {"method": f"{name}:{text}" if text else name}, "a trial")


class Trial(Config):
    """One trial. One that failed has a reason and no numbers; what stopped while `running` goes on first."""

    trial: int
    params: dict[str, Any]
    state: Literal["running", "done", "failed"]
    reason: str = ""
    val_top1: float | None = None
    val_top5: float | None = None
    epoch: int | None = None
    lr: float | None = None
    tuned: int | None = None
    head: int | None = None
    percent_of_backbone: float | None = None
    images_per_s: float | None = None
    time_s: float | None = None


class Fit(Config):
    """What training without a test tells of a trial; saved as `trial.json`."""

    val_top1: float
    val_top5: float
    epoch: int
    lr: float
    tuned: int
    head: int
    percent_of_backbone: float
    images_per_s: float
    time_s: float
    backbone: str
    weights: str
    provenance: dict[str, Any]

    @classmethod
    def saved(cls, directory: Path) -> Self | None:
        """What is there; None where nothing can be read, and training from its last checkpoint says it again."""
        try:
            return cls.build(json.loads((directory / TRIAL_FILE).read_text(encoding="utf-8")), TRIAL_FILE)
        except (OSError, ValueError, ConfigError):
            return None


class Sweep(Config):
    """What a sweep yields; saved as `sweep.json`, from the first trial on.

    Attributes:
        rows: The trials in their order.
        best: The number of the one with the highest top-1 on val; of equals the first.
        result: Of the best one, with its test; None until all are done, or without a test.
        finished: Whether all is done.
    """

    config: SweepConfig
    rows: tuple[Trial, ...] = ()
    best: int | None = None
    result: RunResult | None = None
    finished: bool = False
    backbone: str = ""
    weights: str = ""
    provenance: dict[str, Any] = {}
    output: str

    @property
    def params(self) -> Params:
        """The best trial's; empty where none is done."""
        return {} if self.best is None else dict(self.rows[self.best].params)


def best_of(rows: Sequence[Trial]) -> int | None:
    """The number of the trial with the highest top-1 on val, of equals the first; None while none is done."""
    done = [row for row in rows if row.val_top1 is not None]
    return max(done, key=lambda row: (row.val_top1 or 0.0, -row.trial)).trial if done else None


def read_table(place: Path, config: SweepConfig, at_once: int | None) -> Sweep:
    """The table so far, for `config`, which may want more trials; `at_once` where neither says it."""
    file = place / SWEEP_TABLE
    if not file.exists():
        own = config.model_copy(update={"at_once": config.at_once or at_once})
        return Sweep(config=own, output=str(place))
    try:
        table = Sweep.build(json.loads(file.read_text(encoding="utf-8")), SWEEP_TABLE)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{file} must hold the trials of this sweep, but cannot be used: {error}") from None
    own = config.model_copy(update={"at_once": config.at_once or table.config.at_once or at_once})
    return table.model_copy(update={"config": own, "output": str(place)})


def with_another_try(table: Sweep) -> Sweep:
    """With what failed for data, weights or disk to be tried again: that is not the trial's fault."""
    rows = [
        row.model_copy(update={"state": "running", "reason": ""})
        if row.state == "failed" and row.reason.partition(":")[0] in NOT_OF_THE_TRIAL
        else row
        for row in table.rows
    ]
    return table.model_copy(update={"rows": tuple(rows)})


def write_table(table: Sweep, place: Path) -> Sweep:
    """Write `sweep.json`, and return what was written."""
    replace_file(place / SWEEP_TABLE, (table.model_dump_json(indent=1) + "\n").encode())
    return table


def written(value: Value | None) -> str:
    """The value as `parse_value` reads it back."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
