"""`petune compare`: methods × seeds, one table."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petune.base.errors import UsageError
from petune.cli.options import DryRun, Executor, Json, Seeds, Settings, Track, configured
from petune.cli.running import RUNS, check_executor, check_tracker, started_again, watching
from petune.cli.terminal import clean, print_data, print_json, print_status, print_table

if TYPE_CHECKING:
    from petune.runner.compare import CompareConfig, Comparison

RATE = "lrs."
"""How an assignment begins that gives a method its rate."""
SPARE = ("% of all", "peak memory", "head", "adapter", "top-5", "images/s")
"""Columns that a narrow terminal does without; compare.md has them all."""

Methods = Annotated[
    list[str] | None,
    typer.Argument(metavar="METHOD", help="Registered methods, options in place: vpt:deep=false."),
]


@configured(without=("method", "resume"), defaults={"output": "runs/compare-BACKBONE-DATASET"})
def compare(
    settings: Settings,
    methods: Methods = None,
    *,
    seeds: Seeds = None,
    json: Json = False,
    dry_run: DryRun = False,
    track: Track = None,
    executor: Executor = "serial",
) -> None:
    """Train several methods alike and print one table.

    Started again, it skips the runs that are finished.
    """
    from petune.runner.compare import CompareConfig

    config = CompareConfig.build(_values(settings, methods, seeds), settings.source)
    check_tracker(track)
    check_executor(executor, track)
    if dry_run:
        from petune.cli.dry_run import show_dry_run

        show_dry_run(config, config.methods, as_json=json)
    else:
        run_comparison(config, as_json=json, track=track, executor=executor)


def run_comparison(config: CompareConfig, *, as_json: bool, track: str | None, executor: str = "serial") -> None:
    """Run it, print the table, and exit with 1 if a method failed."""
    from petune.runner.compare import compare as compare_config, compare_name
    from petune.runner.run_dir import COMPARE_FILE

    place = config.output or RUNS / compare_name(config)
    with started_again("compare", place, COMPARE_FILE, executor), watching(track, place) as watch:
        comparison = compare_config(config, executor=executor, watch=watch)
    if as_json:
        print_json(comparison.model_dump(mode="json"))
    else:
        show_comparison(comparison)
    if any(row.status == "failed" for row in comparison.rows):
        raise typer.Exit(1)


def show_comparison(comparison: Comparison) -> None:
    """Print the table, and where its files are."""
    from petune.runner.report.tables import COLUMNS, cells

    print_status(f"{comparison.backbone}, weights {comparison.weights}, on {comparison.config.run.dataset}")
    rows = [(cells(row.model_dump(mode="json")), row) for row in comparison.rows]
    # a reason is a sentence, which no column has room for
    shown = [[*texts[:-1], "failed"] if row.status == "failed" else texts for texts, row in rows]
    print_table(COLUMNS, shown, right=COLUMNS[1:], optional=SPARE)
    for row in comparison.rows:
        if row.status == "failed":
            print_data(clean(f"{row.method} failed: {row.reason}"))
    print_status(f"output: {comparison.output}")


def _values(settings: Settings, methods: list[str] | None, seeds: str | None) -> dict[str, Any]:
    """What belongs to the comparison stays on top, everything else goes to the runs, as in `petune run`."""
    from petune.runner.compare import CompareConfig
    from petune.runner.run_dir import COMPARE_FILE, CONFIG_FILE

    own = CompareConfig.model_fields.keys()
    unused = {"method", "seed", "resume", "run.method", "run.seed", "run.output", "run.resume"} & settings.assigned
    if unused:
        raise UsageError(
            f"a comparison takes its methods as METHOD…, its seeds with --seeds and its directory with --output, and "
            f"always goes on; --set {min(unused)} would change nothing, leave it out"
        )
    rates = [a.removeprefix(RATE) for a in settings.assignments if a.startswith(RATE) and "=" in a]
    others = replace(settings, assignments=tuple(a for a in settings.assignments if a.removeprefix(RATE) not in rates))
    values = others.values(lambda key: key if _first(key) in own else f"run.{key}")
    if rates and isinstance(values.setdefault("lrs", {}), dict):  # what else it may be is refused later
        values["lrs"] |= _rates(rates)
    if (place := settings.own_directory(COMPARE_FILE, CONFIG_FILE)) is not None:
        values["output"] = place
    if methods:
        values["methods"] = methods
    several = settings.seeds(seeds)
    if several is not None:
        values["seeds"] = several
    elif "seed" in settings.flags:
        values["seeds"] = (settings.flags["seed"],)
    return values


def _rates(assignments: list[str]) -> dict[str, Any]:
    """`vpt:deep=false=1e-3` → `{"vpt:deep=false": 0.001}`: a method may itself hold `=` and dots."""
    from petune.base.yaml_values import parse_value

    parts = [text.rpartition("=") for text in assignments]
    return {method.strip(): parse_value(rate.strip()) for method, _, rate in parts}


def _first(key: str) -> str:
    return key.partition("=")[0].partition(".")[0].strip()
