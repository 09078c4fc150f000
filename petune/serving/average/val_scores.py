"""Score averages on val, the split that chose the epochs of the runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from petune.base.errors import UsageError
from petune.base.metric import LOSS, Metric
from petune.runner.file_names import CONFIG_FILE
from petune.runner.migrations import read_config
from petune.serving.average.ingredients import Ingredient
from petune.serving.evaluation import VAL_SPLIT, EvalRequest, evaluate_images, select_images
from petune.serving.predict import Predictor

SPLIT_KEYS = ("dataset", "val_fraction", "folds", "fold", "on_broken", "channels")
"""Options of a run that choose the images of val; its seed does not."""


def check_val(ingredients: Sequence[Ingredient]) -> None:
    """Check that all runs have one val split, on which none of them has trained.

    Raises:
        UsageError: They have not, or it is not known.
    """
    configs = [_config(ingredient) for ingredient in ingredients]
    for ingredient, config in zip(ingredients, configs, strict=True):
        if "final_fit" in ingredient.training:
            raise UsageError(
                f"{ingredient.path} was trained on val in the end (final_fit), so val cannot choose what to average. "
                "Use the algorithm uniform, or runs with final_fit=none"
            )
        if ingredient.metadata.get("kept_splits"):
            raise UsageError(
                f"{ingredient.path} has the splits of an earlier run, so its options do not say which images val has. "
                "Use the algorithm uniform"
            )
        different = [key for key in SPLIT_KEYS if config.get(key) != configs[0].get(key)]
        if different:
            key = different[0]
            raise UsageError(
                f"{ingredients[0].path} and {ingredient.path} have other val splits: {key} is {configs[0].get(key)!r} "
                f"and {config.get(key)!r}. One may have trained on the val images of the other, so val cannot choose "
                "what to average. Use the algorithm uniform, or runs of one split"
            )


def shared_val(ingredients: Sequence[Ingredient]) -> dict[str, object] | None:
    """Return the options that choose the val images of all runs; None if these differ, or are not val of each."""
    try:
        check_val(ingredients)
    except UsageError:
        return None
    config = _config(ingredients[0])
    return {key: config.get(key) for key in SPLIT_KEYS}


def _config(ingredient: Ingredient) -> dict[str, object]:
    if isinstance(recorded := ingredient.metadata.get(VAL_SPLIT), Mapping):
        return dict(recorded)
    for directory in (ingredient.path, ingredient.saved.path.parent):
        if (directory / CONFIG_FILE).is_file():
            return dict(read_config(directory / CONFIG_FILE))
    raise UsageError(
        f"greedy chooses on val, and there is no {CONFIG_FILE} in {ingredient.path} that says which images these are. "
        "Give run directories, or use the algorithm uniform"
    )


def main_metric(ingredient: Ingredient) -> Metric:
    """Return the metric that chose the epoch of a run."""
    return Metric.build((ingredient.metadata.get("metric_info") or [LOSS.model_dump()])[0])


def val_scorer(
    predictor: Predictor, ingredient: Ingredient, metric: Metric, data_dir: Path | None, batch_size: int
) -> Callable[[], float | None]:
    """Return a function that evaluates the predictor's model, as it is then, and returns the metric; None if undefined.

    Args:
        predictor: The model.
        ingredient: A run, whose val split is read.
        metric: Which of the task's metrics.
        data_dir: Directory of downloaded datasets; None is the run's.
        batch_size: Images per forward.

    Raises:
        DataError: The images are missing or have changed.
    """
    images = select_images(predictor, EvalRequest(ingredient.path, "val", None, data_dir, batch_size))

    def value() -> float | None:
        evaluation = evaluate_images(predictor, images, batch_size).evaluation
        found = evaluation.loss if metric.name == LOSS.name else evaluation.metrics.get(metric.name)
        return found if found is not None and math.isfinite(found) else None

    return value
