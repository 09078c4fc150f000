"""`average_adapters`: read adapters, combine their values, and save the result as an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import UsageError
from petune.injector.load import load
from petune.runner.run_adapter import read_run_adapter
from petune.serving.average.averaging import Averaging
from petune.serving.average.record import Averaged
from petune.serving.average.request import AVERAGE, AverageRequest
from petune.serving.average.slot import AdapterSlot
from petune.serving.predict import Predictor


def average_adapters(
    paths: Iterable[str | Path],
    output: str | Path,
    *,
    algorithm: str = "uniform",
    coefficients: Sequence[float] | None = None,
    density: float | None = None,
    seed: int = 0,
    head: str | Path = AVERAGE,
    rank: int | None = None,
    by_factors: bool = False,
    start: str | Path | None = None,
    model: nn.Module | None = None,
    weights: str | None = None,
    data_dir: Path | None = None,
    device: str = "auto",
    batch_size: int = 128,
    trust_remote_code: bool = False,
) -> Averaged:
    """Average adapters of one method and one backbone: `petune.average_adapters(["runs/a", "runs/b"], "soup")`.

    `uniform` averages all. `greedy` adds them from the best to the worst as long as val does not become worse (model
    soups, arXiv 2203.05482). Four algorithms work on what training has changed: `task_arithmetic` (2212.04089), `ties`
    (2306.01708), `dare` (2311.03099) and `wise_ft` (2109.01903), which goes from the start towards the mean. They need
    one start of all adapters: see `petune.serving.average.start`.

    LoRA is combined as changes of weights, the products B·A, and factored again. Other methods are combined value by
    value. Classifiers and statistics of BatchNorm are averaged by every algorithm.

    Args:
        paths: Run or adapter directories. `greedy` needs runs, whose configuration says which images are val.
        output: The adapter directory to create.
        algorithm: One of those above.
        coefficients: Of `uniform` relative weights, by default equal. Of `task_arithmetic` and `dare` the factor of
            each task vector, by default 0.4. Of `ties` the factor of the merged one, 1. Of `wise_ft` the share of the
            trained values, 0.5. One number holds for all adapters.
        density: Share of each task vector that `ties` (by default 0.2) and `dare` (0.1) keep.
        seed: Chooses what `dare` keeps.
        head: `average` the classifiers, which must be of the same classes; the directory of the adapter whose
            classifier is kept; or `none`, for an adapter without one.
        rank: Of an averaged LoRA. None takes the exact one: at most the sum of the ranks, for `ties` and `dare` that of
            the layers.
        by_factors: Combine A and B of LoRA value by value instead. The result is not the average of the changes.
        start: The adapter that the runs have continued, if it is elsewhere now; or an adapter that was saved before the
            training in one's own loop.
        model: The backbone, for adapters that do not record how it is built. An adapter is attached when this returns.
        weights: Where the backbone's weights are now; None takes them from where the run did.
        data_dir: Directory of downloaded datasets; None is the run's.
        device, batch_size: To evaluate `greedy` on val.
        trust_remote_code: Allow a backbone that is built by the function `package.module:factory`.

    Raises:
        UsageError: The adapters have other methods, options, shapes or classes, or no start in common; val is not
            known; `output` exists; or a number is out of range. Nothing is written.
        BackboneMismatch: They belong to other backbones, or to another one than `model`.
        CheckpointError: An adapter is missing or damaged, or the result cannot be written.
        PetuneError: See `petune.Predictor`.
    """
    places = _checked_paths(paths)
    check_arguments(
        "petune.average_adapters",
        output=(output, PathText),
        algorithm=(algorithm, str),
        coefficients=(coefficients, list | tuple | None),
        density=(density, float | int | None),
        seed=(seed, int),
        head=(head, PathText),
        rank=(rank, int | None),
        by_factors=(by_factors, bool),
        start=(start, PathText | None),
        model=(model, nn.Module | None),
        weights=(weights, str | None),
        data_dir=(data_dir, PathText | None),
        device=(device, str),
        batch_size=(batch_size, int),
        trust_remote_code=(trust_remote_code, bool),
    )
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}. Use at least 1")
    request = AverageRequest.of(
        places,
        expand_home(output),
        algorithm=algorithm,
        coefficients=coefficients,
        density=density,
        seed=seed,
        head=head,
        rank=rank,
        by_factors=by_factors,
        start=None if start is None else expand_home(start),
    )
    predictor = None
    if model is None:
        read_run_adapter(request.base.saved.path)  # says what is missing of a description
        predictor = Predictor(
            request.base.saved.path,
            weights=weights,
            device=device if algorithm == "greedy" else "cpu",
            trust_remote_code=trust_remote_code,
        )
        attachment = predictor.attachment
    else:
        attachment = load(model, request.base.saved.path)
    averaging = Averaging(request, AdapterSlot(attachment, request.base.saved), predictor)
    return averaging.run(expand_home(data_dir) if data_dir else None, batch_size)


def _checked_paths(paths: Iterable[str | Path]) -> list[Path]:
    if isinstance(paths, str | bytes | Path) or not isinstance(paths, Iterable):
        raise UsageError(f"petune.average_adapters: paths is a list of directories, not {paths!r}")
    listed = list(paths)
    for path in listed:
        check_arguments("petune.average_adapters", paths=(path, PathText))
    return [expand_home(path) for path in listed]
