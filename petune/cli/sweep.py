"""`petune sweep`: a search over options, chosen on val, the best one tested once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from petune.base.errors import ConfigError, UsageError
from petune.base.text import format_percent
from petune.cli.options import DryRun, Executor, Json, Tracker
from petune.cli.running import RUNS, check_executor, check_tracker, resume_hint, watching
from petune.cli.settings import Settings, configured
from petune.cli.terminal import clean, print_json, print_status, print_table

if TYPE_CHECKING:
    from petune.runner.sweep.trials import Sweep, SweepConfig

Method = Annotated[str | None, typer.Argument(metavar="METHOD", help="A registered method, options in place.")]
Over = Annotated[
    list[str] | None,
    typer.Option(
        "--search",
        metavar="KEY=VALUES",
        help="bottleneck=8,16,64 or train.lr=1e-4..1e-2:log: an option of the method, or train.…; repeatable.",
    ),
]
Trials = Annotated[
    int | None,
    typer.Option("--trials", metavar="INT", help="How many at most; a grid that fits is tried whole.  [default: 20]"),
]
AtOnce = Annotated[
    int | None,
    typer.Option(
        "--parallel-trials",
        metavar="INT",
        help="How many are sampled before the values of any of them are known.  [default: 1; 4 on an executor]",
    ),
]
NoTest = Annotated[bool, typer.Option("--no-test", help="Leave test unread, also by the best one.")]


@configured(without=("method", "resume"), defaults={"output": "runs/sweep-METHOD-BACKBONE-DATASET-seedSEED"})
def sweep(
    settings: Settings,
    method: Method = None,
    *,
    over: Over = None,
    trials: Trials = None,
    at_once: AtOnce = None,
    no_test: NoTest = False,
    json: Json = False,
    dry_run: DryRun = False,
    tracker: Tracker = None,
    executor: Executor = "serial",
) -> None:
    """Search a method's options and training options.

    The best trial is chosen on a validation split, and it alone reads test, once. Started again, it goes on.
    """
    from petune.runner.sweep.trials import SweepConfig

    values = _values(settings, method, over, trials, no_test)
    if at_once is not None:
        values["at_once"] = at_once
    try:
        config = SweepConfig.build(values, settings.source)
    except ConfigError as error:
        raise ConfigError(f"{error}{_hint(str(error), values.get('over'))}") from None
    check_tracker(tracker)
    check_executor(executor, tracker)
    if dry_run:
        from petune.cli.dry_run import print_dry_run
        from petune.runner.sweep.space import corners

        methods = dict.fromkeys(config.trial(params).method for params in corners(config.over))
        print_dry_run(config, list(methods), as_json=json)
    else:
        _run(config, as_json=json, tracker=tracker, executor=executor)


def _run(config: SweepConfig, *, as_json: bool, tracker: str | None, executor: str) -> None:
    from petune.runner.file_names import CONFIG_FILE
    from petune.runner.sweep.search import sweep as sweep_config, sweep_name

    place = config.output or RUNS / sweep_name(config)
    flags = () if executor == "serial" else ("--executor", executor)
    with resume_hint("sweep", place / CONFIG_FILE, *flags), watching(tracker, place) as watch:
        table = sweep_config(config.model_copy(update={"output": place}), executor=executor, watch=watch)
    if as_json:
        print_json(table.model_dump(mode="json"))
    else:
        show_sweep(table)
    if table.best is None:
        raise typer.Exit(1)


def show_sweep(table: Sweep) -> None:
    """Print the trials, best first, and how to run the best one."""
    from petune.runner.report.tables import trial_table

    run = table.config.run
    print_status(f"{table.backbone or run.backbone}, weights {table.weights or run.weights}, on {run.dataset}")
    columns, rows = trial_table(table.model_dump(mode="json"))
    shown = [[*row[:-1], row[-1].partition(":")[0]] for row in rows]  # a reason is a sentence, no column has room
    print_table(columns, shown, right=columns[:-1], optional=("time", "epoch", "tuned"))
    for row in table.rows:
        if row.state == "failed":
            print_status(clean(f"trial {row.trial} failed: {row.reason}"))
    if table.best is not None:
        test = f", {format_percent(table.result.top1)} on test" if table.result else ""
        print_status(clean(f"best: trial {table.best}, {format_percent(table.rows[table.best].val_top1)} on val{test}"))
    print_status(f"output: {table.output}")


def _values(
    settings: Settings, method: str | None, over: list[str] | None, trials: int | None, no_test: bool
) -> dict[str, Any]:
    """What belongs to the sweep stays on top, everything else goes to the runs, as in `petune run`."""
    from petune.runner.file_names import CONFIG_FILE, SWEEP_TABLE
    from petune.runner.sweep.trials import SweepConfig

    own = SweepConfig.model_fields.keys()
    values = settings.values(own)
    directory = settings.config_directory(CONFIG_FILE, SWEEP_TABLE)
    if directory is not None:
        values["output"] = directory
    if method is not None:
        values["run"] = {**values.get("run", {}), "method": method}
    if over:
        values["over"] = {**(values.get("over") or {}), **_over(over)}
    if trials is not None:
        values["trials"] = trials
    if no_test:
        values["test"] = False
    return values


def _over(texts: list[str]) -> dict[str, Any]:
    """All of `--search`, by key.

    Raises:
        UsageError: See `petune.space.parse_over`, or a key stands twice.
    """
    from petune.runner.sweep.space import parse_over

    found: dict[str, Any] = {}
    for text in texts:
        key, values = parse_over(text)
        if key in found:
            raise UsageError(f"--search takes all values of a key at once, {key}=VALUE,VALUE,…, but {key} came twice")
        found[key] = values
    return found


def _hint(problem: str, over: Any) -> str:
    """What to say of a training option that was taken for one of the method."""
    from petune.training.config import TrainConfig

    keys = [key for key in (over or {}) if key in TrainConfig.model_fields and f"{key}: no such key" in problem]
    return f"\ntraining options are written --search train.{keys[0]}=…" if keys else ""
