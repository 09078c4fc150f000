"""Score averages on val, the split that chose the epochs of the runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from petune.base.errors import UsageError
from petune.base.metric import LOSS, Metric
from petune.runner.file_names import CONFIG_FILE
from petune.runner.split_options import SPLIT_KEYS, shared_options
from petune.serving.average.ingredients import Ingredient
from petune.serving.evaluation import EvalRequest, evaluate_images, select_images
from petune.serving.predict import Predictor


def check_val(ingredients: Sequence[Ingredient]) -> None:
    """Check that all runs have one val split, on which none of them has trained.

    Raises:
        UsageError: They have not, or it is not known.
    """
    each = [_options(ingredient) for ingredient in ingredients]
    for ingredient, options in zip(ingredients, each, strict=True):
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
        shared = shared_options([each[0], options]) or {}
        different = [key for key in SPLIT_KEYS if key not in shared]
        if different:
            key = different[0]
            values = [repr(o[key]) if key in o else "not the same in all that it averages" for o in (each[0], options)]
            raise UsageError(
                f"{ingredients[0].path} and {ingredient.path} have other val splits: {key} is {' and '.join(values)}. "
                "One may have trained on the val images of the other, so val cannot choose what to average. Use the "
                "algorithm uniform, or runs of one split"
            )


def _options(ingredient: Ingredient) -> dict[str, Any]:
    options = ingredient.split_options
    if options is None:
        raise UsageError(
            f"greedy chooses on val, and there is no {CONFIG_FILE} in {ingredient.path} that says which images these "
            "are. Give run directories, or use the algorithm uniform"
        )
    return options


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
