"""The configuration of a comparison, and the runs that it consists of."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from petune.base.config import Config, UserPath
from petune.base.errors import ConfigError, did_you_mean
from petune.data.registry import DatasetText
from petune.runner.continued import complete_from_run
from petune.runner.recipes import complete_from_recipe, with_recipe_options
from petune.runner.run_config import DEFAULT_RECIPE, RunConfig
from petune.runner.run_name import directory_name, run_name

MAY_GROW = ("methods", "seeds", "lrs", "baseline", "datasets")
"""Keys that may change when a comparison is continued; each run checks its own configuration."""
UNUSED = ("method", "seed", "output", "resume")
"""Keys of `run` that a comparison sets itself."""


class CompareConfig(Config):
    """The complete configuration of a comparison: methods × seeds on one backbone and one dataset.

    Attributes:
        methods: As for `--method`, with options if needed; each once.
        seeds: Each method runs once with each.
        lrs: Peak learning rates by method, for those that should not use their recipe's: `--set lrs.full=1e-3`.
            Choose them on validation data.
        baseline: The method that the others are compared with; None takes the best one.
        datasets: Several datasets make a grid, see `petune.compare_datasets`; none takes that of `run`.
        run: What all runs share; its method is not used.
        output: The directory; None is `runs/compare-BACKBONE-DATASET`. An existing comparison is continued.
    """

    methods: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field((0,), min_length=1)
    lrs: dict[str, Annotated[float, Field(gt=0, le=1e4)]] = {}
    baseline: str | None = None
    datasets: tuple[DatasetText, ...] = ()
    run: RunConfig = RunConfig()
    output: UserPath | None = None

    @field_validator("methods", "seeds", "datasets")
    @classmethod
    def _each_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        twice = sorted({str(item) for item in value if value.count(item) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is given twice")
        return value

    @field_validator("datasets")
    @classmethod
    def _own_directories(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [directory_name(dataset) for dataset in value]
        same = sorted({dataset for dataset, name in zip(value, names, strict=True) if names.count(name) > 1})
        if same:
            raise ValueError(f"{' and '.join(same)} would have the same directory. Compare on them separately")
        return value

    @field_validator("lrs")
    @classmethod
    def _of_methods(cls, value: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        methods = info.data.get("methods", value)  # wrong methods are reported for themselves
        for name in value:
            if name not in methods:
                raise ValueError(f"{name} is not a method of this comparison{did_you_mean(name, methods)}")
        return value

    @field_validator("baseline")
    @classmethod
    def _one_of_the_methods(cls, value: str | None, info: ValidationInfo) -> str | None:
        methods = info.data.get("methods", (value,))
        if value is not None and value not in methods:
            raise ValueError(f"{value} is not a method of this comparison{did_you_mean(value, methods)}")
        return value

    @field_validator("run")
    @classmethod
    def _named_by_the_comparison(cls, value: RunConfig, info: ValidationInfo) -> RunConfig:
        seeds = info.data.get("seeds")
        if seeds is not None and value.seed not in (RunConfig.model_fields["seed"].default, *seeds):
            raise ValueError(f"seed is {value.seed}, and a comparison runs its seeds: {', '.join(map(str, seeds))}")
        if value.output is not None:
            raise ValueError("output is that of one run. Set the output of the comparison, which places its runs")
        return value

    @property
    def directory(self) -> Path:
        """Return the directory of the comparison: `output`, or the default one."""
        return self.output or Path("runs") / compare_name(self)

    def completed(self) -> CompareConfig:
        """Return the configuration with what all runs take from the run that they continue, and from their recipe.

        Raises:
            ConfigError, CheckpointError: See `complete_from_run` and `complete_from_recipe`.
        """
        run = complete_from_recipe(self._continued(), self.methods)
        if run.recipe == DEFAULT_RECIPE or run.from_run is not None:
            return self.model_copy(update={"run": run})
        complete = {method: with_recipe_options(method, run.recipe) for method in self.methods}
        for first, second in itertools.combinations(self.methods, 2):
            if complete[first] == complete[second]:
                raise ConfigError(
                    f"with recipe={run.recipe}, {first} and {second} are one method. Leave out one of them"
                )
        lrs = {complete[method]: lr for method, lr in self.lrs.items()}
        baseline = complete.get(self.baseline or "")
        return self.model_copy(
            update={"run": run, "methods": tuple(complete.values()), "lrs": lrs, "baseline": baseline}
        )

    def _continued(self) -> RunConfig:
        """Return what the runs share, completed from the run that they continue, whose method all have."""
        if self.run.from_run is None:
            return self.run
        starts = [
            complete_from_run(self.run.model_copy(update={"method": method}), with_data=not self.datasets)
            for method in self.methods
        ]
        return starts[0].model_copy(update={"method": self.run.method})

    def to_store(self) -> CompareConfig:
        """Return the configuration for `config.yaml`, without values that are not used."""
        fields = RunConfig.model_fields
        run = self.run.model_copy(update={key: fields[key].default for key in UNUSED})
        return self.model_copy(update={"run": run, "output": None})

    def on(self, dataset: str) -> CompareConfig:
        """Return the complete configuration of the comparison on one of several datasets, in a directory of its own."""
        run = self.run.model_copy(update={"dataset": dataset})
        output = self.directory / directory_name(dataset)
        return self.model_copy(update={"run": run, "datasets": (), "output": output}).completed()

    def runs(self) -> list[RunConfig]:
        """Return the configuration of each run, in its own directory, methods first and then seeds."""
        return [self._one_run(method, seed) for method in self.methods for seed in self.seeds]

    def _one_run(self, method: str, seed: int) -> RunConfig:
        train = self.run.train.model_copy(update={"lr": self.lrs.get(method, self.run.train.lr)})
        changes = {"method": method, "seed": seed, "resume": True, "train": train}
        config = self.run.model_copy(update=changes)
        return config.model_copy(update={"output": self.directory / run_name(config)})


def compare_name(config: CompareConfig) -> str:
    """Return the name of the directory of a comparison that has no `output`."""
    datasets = config.datasets or (config.run.dataset,)
    return directory_name("compare", config.run.backbone, *datasets)
