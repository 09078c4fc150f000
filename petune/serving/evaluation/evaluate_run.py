"""Evaluate a run on its own test or val split, or on other images of the same classes."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import UsageError
from petune.serving.evaluation.eval_images import EvalRequest, EvalSplit, select_images
from petune.serving.evaluation.evaluated import evaluate_images
from petune.serving.evaluation.metrics import Evaluation
from petune.serving.predict import Predictor
from petune.training.config import Precision


def evaluate(
    path: str | Path,
    *,
    split: EvalSplit = "test",
    dataset: str | None = None,
    data_dir: Path | None = None,
    weights: str | None = None,
    device: str = "auto",
    precision: Precision | None = None,
    batch_size: int = 128,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Evaluate a trained model: `petune.evaluate("runs/pets").metrics`.

    Args:
        path: A run directory, or an adapter directory.
        split: `test`, or `val`, which chose the run's epoch.
        dataset: None is the run's own dataset. For `folder:PATH`, the class folders must be named after the run's
            classes; some may be missing. Of PATH/test and PATH/val the split is read, of PATH/CLASS/* all images (the
            split is then called `all`). If the folder is the run's own, or a copy of it, only its own split is read,
            so that no training image is evaluated.
        data_dir: Directory of downloaded datasets; None is the run's.
        weights: Where the backbone's weights are now; None takes them from where the run did.
        device: As in a run.
        precision: None is that of the run, so that its own test gives the numbers of the run again.
        batch_size: Images per forward.
        trust_remote_code: Allow a backbone that is built by the function `package.module:factory`.

    Raises:
        DataError: The images are missing, broken or of other classes.
        UsageError: There is no such split, or an argument has another type.
        PetuneError: See `petune.Predictor`.
    """
    check_arguments(
        "petune.evaluate",
        path=(path, PathText),
        split=(split, str),
        dataset=(dataset, str | None),
        data_dir=(data_dir, PathText | None),
        weights=(weights, str | None),
        device=(device, str),
        precision=(precision, str | None),
        batch_size=(batch_size, int),
        trust_remote_code=(trust_remote_code, bool),
    )
    if split not in get_args(EvalSplit):
        raise UsageError(f"no such split: {split!r}. Use test or val")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}. It must be at least 1")
    predictor = Predictor(
        path, weights=weights, device=device, precision=precision, trust_remote_code=trust_remote_code
    )
    request = EvalRequest(expand_home(path), split, dataset, data_dir, batch_size)
    return evaluate_images(predictor, select_images(predictor, request), batch_size).evaluation
