"""Choose a method's recipe by name, and fill in what it says about a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from petune.base.errors import ConfigError, did_you_mean
from petune.data import Dataset
from petune.data.policy import check_augment
from petune.data.steps import check_split
from petune.injector.registry import build_tuner, parse_method
from petune.injector.tuner import Recipe, Tuner
from petune.runner.continued import complete_from_run
from petune.runner.run_config import DEFAULT_RECIPE, RunConfig
from petune.training.config import AUTO, TrainConfig

Run = TypeVar("Run", bound=RunConfig)


def choose_recipe(tuner: Tuner[Any], name: str) -> Recipe:
    """Return a recipe of a method by its name; `default` is the one that every method has.

    Raises:
        ConfigError: The method has no such recipe.
    """
    if name == DEFAULT_RECIPE:
        return tuner.recipe
    if name not in tuner.recipes:
        known = [DEFAULT_RECIPE, *tuner.recipes]
        raise ConfigError(
            f"{tuner.method} has no recipe {name!r}{did_you_mean(name, known)}. It has: {', '.join(known)}",
            cli_hint="Choose one with --recipe, or leave it out",
        )
    return tuner.recipes[name]


def complete_run(config: Run) -> Run:
    """Return the configuration of a run with what it leaves open: from the run that it continues, then from its recipe.

    Raises:
        ConfigError, CheckpointError: See `complete_from_run` and `complete_from_recipe`.
    """
    config = complete_from_run(config)
    return complete_from_recipe(config, (config.method,))


def complete_from_recipe(config: Run, methods: Sequence[str]) -> Run:
    """Return a configuration with what the recipe that it names sets and it leaves open.

    That is epochs, warm-up and head, and options of its method; see `with_recipe_options`. A run that continues another
    one keeps the options of that one's method.

    Learning rate, weight decay and optimizer stay open: they are filled in for each method when it trains.

    Args:
        config: A run, or what the runs of a comparison share.
        methods: The methods that run with it.

    Raises:
        ConfigError: A method has no such recipe, or the recipes of two methods differ in one of these options.
    """
    if config.recipe == DEFAULT_RECIPE:
        return config
    recipes = {method: choose_recipe(build_tuner(method), config.recipe) for method in methods}
    method = config.method
    if method in methods and config.from_run is None:
        method = with_recipe_options(method, config.recipe)
    train = {key: _shared(recipes, key) for key in ("epochs", "warmup") if key not in config.train.model_fields_set}
    head = {} if "head" in config.model_fields_set else {"head": _shared(recipes, "head")}
    update: dict[str, Any] = {key: value for key, value in head.items() if value is not None}
    update["method"] = method
    update["train"] = config.train.model_copy(update={key: v for key, v in train.items() if v is not None})
    return config.model_copy(update=update)


def complete_options(train: TrainConfig, recipe: Recipe, dataset: Dataset, side: int) -> TrainConfig:
    """Return `train` with open options filled in from the method's recipe and the dataset.

    Args:
        train: As configured.
        recipe: The method's.
        dataset: Its images have to go with the augmentation.
        side: Of the images that the backbone takes, in pixels.

    Raises:
        ConfigError: The augmentation is not for such images.
    """
    augment = dataset.augment if train.augment == AUTO else train.augment
    check_split(augment, dataset.train)
    check_augment(augment, side=side, channels=dataset.train.images.shape[-1])
    filled = {
        "lr": recipe.peak_lr(train.batch_size) if train.lr is None else train.lr,
        "weight_decay": recipe.weight_decay if train.weight_decay is None else train.weight_decay,
        "optimizer": train.optimizer or recipe.optimizer,
        "augment": augment,
    }
    return train.model_copy(update=filled)


def with_recipe_options(method: str, name: str) -> str:
    """Return a method with the options that its recipe sets and `method` leaves open: `adaptformer:dropout=0.0`.

    Args:
        method: With its options.
        name: The recipe.
    """
    tuner = build_tuner(method)
    options = choose_recipe(tuner, name).options
    added = [f"{key}={value}" for key, value in options.items() if key not in tuner.config.model_fields_set]
    has_options = bool(parse_method(method)[1])
    return f"{method}{',' if has_options else ':'}{','.join(added)}" if added else method


def _shared(recipes: dict[str, Recipe], key: str) -> Any:
    """Return the value that the recipes of all methods have."""
    values = {method: getattr(recipe, key) for method, recipe in recipes.items()}
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{value} for {method}" for method, value in values.items())
        raise ConfigError(f"the recipes of these methods differ in {key}: {listed}. Give {key}, which all runs share")
    return next(iter(values.values()))
