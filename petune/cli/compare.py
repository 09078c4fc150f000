"""`petune compare`: several methods and seeds, one table."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petune.base.errors import UsageError
from petune.cli.options import DryRun, Executor, Jobs, Json, Seeds, Tracker, executor_of
from petune.cli.running import check_executor, check_tracker, resume_hint, watching
from petune.cli.settings import Settings, configured
from petune.cli.terminal import clean, print_data, print_json, print_status, print_table

if TYPE_CHECKING:
    from petune.runner.compare_config import CompareConfig
    from petune.runner.comparison import Comparison

LR_PREFIX = "lrs."
"""Start of a --set that gives one method its own learning rate."""
UNUSED = {"method", "seed", "resume", "run.method", "run.seed", "run.output", "run.resume"}
"""Keys that a comparison sets itself, for every run."""
OPTIONAL_COLUMNS = ("% of all", "peak memory", "head", "adapter")
"""Columns hidden first on a narrow terminal; compare.md has them all."""
LAST_OPTIONAL_COLUMNS = ("images/s", "clips/s", "val", "time per run", "% of backbone")
"""Columns hidden if it is still too narrow without any metric but the main one."""
EXAMPLE = "petune compare linear adaptformer vpt:deep=false --backbone vit_nano --dataset digits"

Methods = Annotated[
    list[str] | None,
    typer.Argument(metavar="METHOD", help="Methods, with options after a colon: vpt:deep=false."),
]


Datasets = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        metavar="NAME",
        help="Dataset; repeat it for a grid of methods and datasets.  [default: cifar10]",
        show_default=False,
    ),
]

Baseline = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        metavar="METHOD",
        help="Compare the others with this method.  [default: the best one]",
        show_default=False,
    ),
]


@configured(without=("method", "from", "resume", "dataset"), defaults={"output": "runs/compare-BACKBONE-DATASET"})
def compare(
    settings: Settings,
    methods: Methods = None,
    *,
    dataset: Datasets = None,
    seeds: Seeds = None,
    baseline: Baseline = None,
    json: Json = False,
    dry_run: DryRun = False,
    tracker: Tracker = None,
    executor: Executor = None,
    jobs: Jobs = None,
) -> None:
    """Train several methods under equal conditions and print one table, or a grid for several datasets.

    If interrupted, rerun the same command to resume; finished runs are skipped.
    """
    from petune.runner.compare_config import CompareConfig

    own = {"methods": methods, "seeds": seeds, "datasets": dataset, "baseline": baseline}
    _check_given_once(settings, own)
    settings = _with_dataset(settings, dataset)
    values = _values(settings, methods, seeds)
    if dataset:
        values["datasets"] = dataset if len(dataset) > 1 else ()
    if values.get("datasets") and settings.assigned & {"dataset", "run.dataset"}:
        raise UsageError("--set dataset has no effect on several datasets. Name all of them with --dataset")
    if baseline is not None:
        values["baseline"] = baseline
    config = CompareConfig.build(values, settings.source).completed()
    check_tracker(tracker)
    executor = executor_of(executor, jobs)
    check_executor(executor, tracker)
    if dry_run:
        from petune.cli.dry_run import print_dry_run
        from petune.data.lookup import count_classes
        from petune.runner.compare import check_comparison

        for part in [config.on(name) for name in config.datasets] or [config]:
            check_comparison(part)
            count_classes(part.run.dataset)
        print_dry_run(config, config.methods, as_json=json)
    elif config.datasets:
        _run_grid(config, as_json=json, tracker=tracker, executor=executor)
    else:
        run_comparison(config, as_json=json, tracker=tracker, executor=executor)


def run_comparison(config: CompareConfig, *, as_json: bool, tracker: str | None, executor: str = "serial") -> None:
    """Run a comparison, print its table, and exit with 1 if a method failed."""
    from petune.runner.compare import compare as compare_config
    from petune.runner.file_names import CONFIG_FILE

    output = config.directory
    flags = () if executor == "serial" else ("--executor", executor)
    with resume_hint("compare", output / CONFIG_FILE, *flags, tracker=tracker), watching(tracker, output) as watch:
        comparison = compare_config(config, executor=executor, watch=watch)
    if as_json:
        print_json(comparison.model_dump(mode="json"))
    else:
        print_comparison(comparison)
    if any(row.status == "failed" for row in comparison.rows):
        raise typer.Exit(1)


def _with_dataset(settings: Settings, datasets: list[str] | None) -> Settings:
    return replace(settings, flags={**settings.flags, "dataset": datasets[0]}) if datasets else settings


def _run_grid(config: CompareConfig, *, as_json: bool, tracker: str | None, executor: str) -> None:
    from petune.runner.file_names import CONFIG_FILE
    from petune.runner.grid import compare_datasets

    flags = () if executor == "serial" else ("--executor", executor)
    with (
        resume_hint("compare", config.directory / CONFIG_FILE, *flags, tracker=tracker),
        watching(tracker, config.directory) as watch,
    ):
        grid = compare_datasets(config, executor=executor, watch=watch)
    if as_json:
        print_json(grid.model_dump(mode="json"))
    else:
        headings, rows = grid.table()
        print_table(headings, rows, right=headings[1:])
        for sentence in (grid.about, *grid.conclusions(), *grid.intervals()):
            print_status(clean(sentence))
        for dataset, reasons in grid.reasons.items():
            for method, reason in reasons.items():
                print_data(clean(f"{method} failed on {dataset}: {reason}"))
        print_status(f"output: {grid.output}")
    if grid.reasons:
        raise typer.Exit(1)


def print_comparison(comparison: Comparison) -> None:
    """Print the table, the reason of each failed method, and the directory."""
    from petune.runner.report.tables import cells, compare_columns, ranked

    where = f"{comparison.backbone}, weights {comparison.weights}, on {comparison.config.run.dataset}"
    print_status(", ".join([where, *comparison.formats]))
    table = []
    reasons = []
    rows = ranked([row.model_dump(mode="json") for row in comparison.rows], comparison.metric_info)
    columns = compare_columns(comparison.metric_info, rows)
    for row in rows:
        texts = cells(row, columns)
        if row["status"] == "failed":
            texts[-1] = "failed"  # the reason is a sentence, printed below the table
            reasons.append(f"{row['method']} failed: {row['reason']}")
        table.append(texts)
    names = list(columns)
    metrics = [metric.label for metric in comparison.metric_info[1:]]
    optional = (*OPTIONAL_COLUMNS, *metrics, *LAST_OPTIONAL_COLUMNS)
    print_table(names, table, right=names[1:], optional=[name for name in optional if name in columns])
    if comparison.conclusion:
        print_status(clean(f"{comparison.conclusion} {comparison.intervals}".strip()))
    for reason in reasons:
        print_data(clean(reason))
    print_status(f"output: {comparison.output}")


def _values(settings: Settings, methods: list[str] | None, seeds: str | None) -> dict[str, Any]:
    """Return the values of a CompareConfig; keys that are not its own belong to the runs, as in `petune run`."""
    from petune.runner.compare_config import CompareConfig
    from petune.runner.file_names import CONFIG_FILE, LOCK_FILE

    advice = "Name methods as METHOD…, seeds with --seeds and the directory with --output; a comparison always resumes"
    settings.check_no_effect(UNUSED, f"a comparison. {advice}")
    rates = [a.removeprefix(LR_PREFIX) for a in settings.assignments if a.startswith(LR_PREFIX) and "=" in a]
    others = tuple(a for a in settings.assignments if a.removeprefix(LR_PREFIX) not in rates)
    values = replace(settings, assignments=others).values(CompareConfig.model_fields.keys())
    if rates and isinstance(values.setdefault("lrs", {}), dict):  # anything else is reported by CompareConfig
        values["lrs"] |= _parse_rates(rates)
    directory = settings.config_directory(CONFIG_FILE, LOCK_FILE)
    if directory is not None and "methods" in values:  # the file is a comparison's, not a run's
        values["output"] = directory
    run = values.get("run")
    of_run = run if isinstance(run, dict) else {}  # anything else is reported by CompareConfig
    if methods:
        values["methods"] = methods
    seed_list = settings.seeds(seeds)
    if seed_list is not None:
        values["seeds"] = seed_list
    elif "seed" in of_run and ("seed" in settings.flags or "seeds" not in values):
        values["seeds"] = (of_run["seed"],)
    if seed_list is not None or "seeds" in settings.assigned:
        of_run.pop("seed", None)
    if not values.get("methods"):
        raise UsageError(f"no methods to compare. Name at least one, for example:\n  {EXAMPLE}")
    return values


def _check_given_once(settings: Settings, own: dict[str, Any]) -> None:
    """Check that --set gives none of the keys in `own` that the command's arguments and flags give."""
    names = {"methods": "METHOD", "seeds": "--seeds", "datasets": "--dataset", "baseline": "--baseline"}
    given = {key: name for key, name in names.items() if own[key]}
    if "seed" in settings.flags:
        given.setdefault("seeds", "--seed")
    settings.check_given_once(given)


def _parse_rates(assignments: list[str]) -> dict[str, Any]:
    """Parse `vpt:deep=false=1e-3` as `{"vpt:deep=false": 0.001}`; the method may contain `=` and dots itself."""
    from petune.base.yaml_values import parse_value

    parts = [text.rpartition("=") for text in assignments]
    return {method.strip(): parse_value(rate.strip()) for method, _, rate in parts}
