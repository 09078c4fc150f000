"""`petune sweep`: search options on the validation split and test the best trial once."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petune.base.errors import UsageError
from petune.cli.options import DryRun, Executor, Jobs, Json, Tracker, executor_of
from petune.cli.running import RUNS, check_executor, check_tracker, resume_hint, watching
from petune.cli.settings import Settings, configured
from petune.cli.terminal import clean, print_json, print_status, print_table

if TYPE_CHECKING:
    from petune.runner.sweep.sweep_config import SweepConfig
    from petune.runner.sweep.trials import Sweep

Method = Annotated[
    str | None, typer.Argument(metavar="METHOD", help="A method, with options after a colon: vpt:deep=false.")
]
Search = Annotated[
    list[str] | None,
    typer.Option(
        "--search",
        metavar="KEY=VALUES",
        help="bottleneck=8,16,64 or train.lr=1e-4..1e-2:log: an option of the method or of the training; repeatable.",
    ),
]
Trials = Annotated[
    int | None,
    typer.Option(
        "--trials",
        metavar="NUMBER",
        help="The most trials; a grid with no more combinations is tried completely.  [default: 20]",
    ),
]
ParallelTrials = Annotated[
    int | None,
    typer.Option(
        "--parallel-trials",
        metavar="NUMBER",
        help="Trials sampled before the results of any of them are known.  [default: 1; 4 with an executor]",
    ),
]
NoTest = Annotated[bool, typer.Option("--no-test", help="Do not test the best trial.")]
OPTIONAL_COLUMNS = ("time", "epoch", "tuned")
"""Columns hidden on a narrow terminal."""
UNUSED = {"resume", "run.output", "run.resume"}
"""Keys that a sweep sets itself, for every trial."""
EXAMPLE = "petune sweep adaptformer --search bottleneck=16,64 --search train.lr=1e-4..1e-2:log"


@configured(without=("method", "from", "resume"), defaults={"output": "runs/sweep-METHOD-BACKBONE-DATASET-seedSEED"})
def sweep(
    settings: Settings,
    method: Method = None,
    *,
    search: Search = None,
    trials: Trials = None,
    parallel_trials: ParallelTrials = None,
    no_test: NoTest = False,
    json: Json = False,
    dry_run: DryRun = False,
    tracker: Tracker = None,
    executor: Executor = None,
    jobs: Jobs = None,
) -> None:
    """Search options of a method and of the training.

    The best trial is chosen on a validation split; it alone is tested, once. If interrupted, rerun the same command to
    resume.
    """
    from petune.runner.sweep.sweep_config import SweepConfig

    own = {
        "search": _parse_searches(search or ()),
        "trials": trials,
        "parallel_trials": parallel_trials,
        "test": False if no_test else None,
    }
    config = SweepConfig.build(_values(settings, method, own), settings.source).completed()
    check_tracker(tracker)
    executor = executor_of(executor, jobs)
    check_executor(executor, tracker)
    if dry_run:
        from petune.cli.dry_run import print_dry_run
        from petune.runner.sweep.search import check_sweep
        from petune.runner.sweep.space import corners

        check_sweep(config)
        methods = dict.fromkeys(config.trial(params).method for params in corners(config.search))
        print_dry_run(config, list(methods), as_json=json)
    else:
        _run(config, as_json=json, tracker=tracker, executor=executor)


def _run(config: SweepConfig, *, as_json: bool, tracker: str | None, executor: str) -> None:
    from petune.runner.file_names import CONFIG_FILE
    from petune.runner.sweep.search import sweep as sweep_config, sweep_name

    output = config.output or RUNS / sweep_name(config)
    flags = () if executor == "serial" else ("--executor", executor)
    with resume_hint("sweep", output / CONFIG_FILE, *flags, tracker=tracker), watching(tracker, output) as watch:
        table = sweep_config(config.model_copy(update={"output": output}), executor=executor, watch=watch)
    if as_json:
        print_json(table.model_dump(mode="json"))
    else:
        print_sweep(table)
    if table.best is None:
        raise typer.Exit(1)


def print_sweep(table: Sweep) -> None:
    """Print the trials, best first, the reason of each failed one, and the directory."""
    from petune.runner.report.tables import trial_table

    run = table.config.run
    print_status(f"{table.backbone or run.backbone}, weights {table.weights or run.weights}, on {run.dataset}")
    columns, rows = trial_table(table.model_dump(mode="json"))
    states = {str(row.trial): row.state for row in table.rows}  # the reasons of failures are printed below
    print_table(columns, [[*row[:-1], states[row[0]]] for row in rows], right=columns[:-1], optional=OPTIONAL_COLUMNS)
    for row in table.rows:
        if row.state == "failed":
            print_status(clean(f"trial {row.trial} failed: {row.reason}"))
    if table.best is not None:
        main = table.metric_info[0]
        test = f", {main.text(table.result.metrics.get(main.name))} on test" if table.result else ""
        print_status(clean(f"best: trial {table.best}, {main.text(table.val(table.rows[table.best]))} on val{test}"))
        for sentence in table.at_an_edge():
            print_status(clean(sentence))
    print_status(f"output: {table.output}")


def _values(settings: Settings, method: str | None, own: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a SweepConfig; keys that are not its own belong to the runs, as in `petune run`.

    Args:
        settings: What all flags and --set give.
        method: The argument METHOD.
        own: What the command's own flags give; None where they are absent.
    """
    from petune.runner.file_names import CONFIG_FILE, SWEEP_TABLE
    from petune.runner.sweep.sweep_config import SweepConfig

    settings.check_no_effect(UNUSED, "a sweep. Name the directory with --output; a sweep always resumes")
    settings.check_given_once(_given(method, own))
    values = settings.values(SweepConfig.model_fields.keys())
    directory = settings.config_directory(CONFIG_FILE, SWEEP_TABLE)
    if directory is not None:
        values["output"] = directory
    if method is not None:
        values["run"] = {**values.get("run", {}), "method": method}
    if own["search"]:
        own["search"] = {**(values.get("search") or {}), **own["search"]}
    values |= {key: value for key, value in own.items() if value not in (None, {})}
    if not values.get("search"):
        raise UsageError(f"nothing to search. Give at least one --search, for example:\n  {EXAMPLE}")
    _check_searched_only(settings, method, values["search"])
    return values


def _given(method: str | None, own: dict[str, Any]) -> dict[str, str]:
    """Return the argument or flag that gives each key."""
    given = dict.fromkeys(("method", "run.method"), "METHOD") if method is not None else {}
    given |= {f"search.{key}": f"--search {key}" for key in own["search"]}
    flags = {"search": "--search", "trials": "--trials", "parallel_trials": "--parallel-trials", "test": "--no-test"}
    return given | {key: flag for key, flag in flags.items() if own[key] not in (None, {})}


def _check_searched_only(settings: Settings, method: str | None, search: Collection[str]) -> None:
    """Check that the command line gives no single value to a key that is searched.

    Raises:
        UsageError: It does.
    """
    from petune.injector.registry import parse_method
    from petune.runner.sweep.sweep_config import TRAINING

    given = settings.flags.keys() | {key.removeprefix("run.") for key in settings.assigned}
    given = {key for key in given if key.startswith(TRAINING)} | (parse_method(method)[1].keys() if method else set())
    for key in given.intersection(search):
        raise UsageError(f"{key} is searched, but one value of it is given too. Leave that value or the search out")


def _parse_searches(texts: list[str] | tuple[()]) -> dict[str, Any]:
    """Parse every --search, by key.

    Raises:
        UsageError: One is malformed, or a key is given twice.
    """
    from petune.runner.sweep.space import parse_search

    searches: dict[str, Any] = {}
    for text in texts:
        key, dimension = parse_search(text)
        if key in searches:
            raise UsageError(f"--search {key} is given twice. Write all values in one: {key}=VALUE,VALUE,…")
        searches[key] = dimension
    return searches
