"""`petune run`: one method, one backbone, one dataset; with --seeds one run per seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from petune.base.distributed import init_group
from petune.base.errors import UsageError
from petune.cli.options import DryRun, Folds, Jobs, Json, Seeds, Tracker, executor_of
from petune.cli.running import (
    RUNS,
    check_directory,
    check_executor,
    check_resumable,
    check_tracker,
    resume_hint,
    run_directory,
    watching,
)
from petune.cli.settings import Settings, configured
from petune.cli.terminal import print_facts, print_json, print_status, print_table

if TYPE_CHECKING:
    from petune.runner.compare_config import CompareConfig
    from petune.runner.result import RunResult
    from petune.runner.run_config import RunConfig


@configured()
def run(
    settings: Settings,
    *,
    seeds: Seeds = None,
    folds: Folds = None,
    json: Json = False,
    dry_run: DryRun = False,
    tracker: Tracker = None,
    jobs: Jobs = None,
) -> None:
    """Train one method, test it once and save its adapter.

    The epoch is chosen on a validation split. The run directory holds config, metrics, result and adapter.
    """
    from petune.runner.recipes import complete_run
    from petune.runner.run_config import RunConfig

    if folds is not None:
        settings.check_given_once({"folds": "--folds"})
    values = settings.values() if folds is None else {**settings.values(), "folds": folds}
    config = complete_run(RunConfig.build(values, settings.source))
    seed_list = settings.seeds(seeds)
    is_validation = config.folds is not None and config.fold is None
    check_tracker(tracker)
    if jobs is not None and (seed_list is None or is_validation):
        raise UsageError("--jobs divides the cores among the runs of --seeds. Give several seeds, or leave it out")
    executor = executor_of(None, jobs)
    if jobs is not None:
        check_executor(executor, tracker)
    resume = "resume" in settings.flags
    if resume:
        _check_several_resumable(config, seed_list, is_validation)
    if dry_run:
        from petune.cli.dry_run import print_dry_run

        runs = _planned_runs(config, seed_list, is_validation, resume=resume)
        print_dry_run(config, (config.method,), as_json=json, runs=runs)
    elif is_validation:
        _run_folds(config, seed_list, json, tracker)
    elif seed_list is not None:
        _run_seeds(config, seed_list, json, tracker, executor)
    else:
        _run_once(config, json, tracker, resume=resume)


def print_result(result: RunResult, *, as_json: bool) -> None:
    """Print the result of a run, one fact per line."""
    if as_json:
        print_json(result.model_dump(mode="json"))
    else:
        print_facts(result.facts())


def _run_once(config: RunConfig, as_json: bool, tracker: str | None, *, resume: bool) -> None:
    from petune.runner.file_names import CONFIG_FILE
    from petune.runner.run import run as run_config
    from petune.runner.run_name import run_name

    output = init_group().broadcast(lambda: run_directory(config, run_name(config), resume=resume))
    config = config.model_copy(update={"output": output})
    with resume_hint("run", output / CONFIG_FILE, "--resume", tracker=tracker), watching(tracker, output) as watch:
        result = run_config(config, watch=watch)
    print_result(result, as_json=as_json)


def _run_folds(config: RunConfig, seeds: tuple[int, ...] | None, as_json: bool, tracker: str | None) -> None:
    from petune.runner.cross_validate import cross_validate, fold_runs

    directory = Path(str(fold_runs(config, seeds)[0].output)).parent
    with watching(tracker, directory) as watch:
        validation = cross_validate(config, seeds=seeds, watch=watch)
    if as_json:
        print_json(validation.model_dump(mode="json"))
        return
    headings, rows = validation.table()
    print_table(headings, rows, right=headings[1:])
    print_status(f"output: {validation.output}")


def _run_seeds(config: RunConfig, seeds: tuple[int, ...], as_json: bool, tracker: str | None, executor: str) -> None:
    from petune.cli.compare import run_comparison

    run_comparison(_comparison(config, seeds), as_json=as_json, tracker=tracker, executor=executor)


def _check_several_resumable(config: RunConfig, seeds: tuple[int, ...] | None, is_validation: bool) -> None:
    """Check that there are runs of --folds or --seeds to resume; `run_directory` checks a single run."""
    from petune.runner.cross_validate import fold_runs

    if is_validation:
        check_resumable(Path(str(fold_runs(config, seeds)[0].output)))
    elif seeds is not None:
        check_resumable(_comparison(config, seeds).directory)


def _comparison(config: RunConfig, seeds: tuple[int, ...]) -> CompareConfig:
    """Return the comparison that does one run for each seed."""
    from petune.runner.compare_config import CompareConfig
    from petune.runner.run_name import run_name

    name = run_name(config).removesuffix(f"-seed{config.seed}") + "-seeds"
    run = config.model_copy(update={"seed": seeds[0], "output": None})
    values = {"methods": (config.method,), "seeds": seeds, "run": run, "output": config.output or RUNS / name}
    return CompareConfig.build(values, "the command line")


def _planned_runs(
    config: RunConfig, seeds: tuple[int, ...] | None, is_validation: bool, *, resume: bool
) -> list[RunConfig]:
    """Return the runs that a command would do, after checking their directories; empty for a single one."""
    from petune.runner.compare import check_comparison
    from petune.runner.cross_validate import check_fold_runs, fold_runs
    from petune.runner.run_name import run_name

    if is_validation:
        runs = fold_runs(config, seeds)
        check_fold_runs(runs)
        return runs
    if seeds is not None:
        comparison = _comparison(config, seeds)
        check_comparison(comparison)
        return comparison.runs()
    check_directory(config, run_name(config), command="run", resume=resume)
    return []
