"""Compare methods: methods × seeds on one backbone and one dataset, one table; finished runs are not repeated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from petune.backbones.create import check_weights
from petune.backbones.quantize import check_base_precision
from petune.base.arguments import check_watch
from petune.base.distributed import init_group
from petune.base.errors import CheckpointError, ConfigError, PetuneError, UsageError
from petune.base.metric import Metric
from petune.injector.registry import build_tuner
from petune.injector.tuner import TunerConfig
from petune.runner.compare_config import MAY_GROW, CompareConfig
from petune.runner.compare_differences import with_differences
from petune.runner.comparison import Comparison, note_of_formats, origins_of, summarize
from petune.runner.directory_kind import check_kind
from petune.runner.events import RunEvent, RunStarted, WatchRuns
from petune.runner.executors import Executor, FromRun, Started, choose_executor
from petune.runner.file_names import COMPARE_PAGE, COMPARE_PLOT, COMPARE_TABLE, CONFIG_FILE
from petune.runner.report.tables import seeds_by_method
from petune.runner.result import RunResult
from petune.runner.run import check_task_of_dataset
from petune.runner.run_config import RunConfig
from petune.runner.run_dir import NEW_OUTPUT, check_run_dir, open_run_dir
from petune.runner.run_inputs import RunInputs, check_inputs, check_pixels_of_runs
from petune.runner.stored_config import check_config, write_config
from petune.training.events import Event, Note
from petune.training.run_files import METRICS_FILE
from petune.training.task import choose_metrics
from petune.training.task_registry import AUTO_TASK, BUILT_IN, build_task

TABLES = (COMPARE_TABLE, COMPARE_PAGE, COMPARE_PLOT)


def compare(
    config: CompareConfig | None = None,
    *,
    executor: str | Executor = "serial",
    watch: WatchRuns = lambda event: None,
    **fields: Any,
) -> Comparison:
    """Run every method with every seed: `petune.compare(methods=("linear", "vpt"), run={"dataset": "digits"})`.

    A method that fails gets a row with the reason; the others still run. If interrupted, call it again to resume.

    Args:
        config: The comparison; without it, `fields` are those of a CompareConfig.
        executor: What does the runs, as `local:jobs=2` or `ray:cpus=2`; see `petune.runner.executors`.
        watch: Called with every run, step, epoch and note.

    Raises:
        ConfigError: It has `datasets`, which are for `petune.compare_datasets`, or an option is wrong.
        MissingExtra: The executor's package is not installed.
        WeightsUnavailable: The weights of the backbone cannot be had.
        UsageError: The directory holds something else or is in use, or one of its runs has other options.
        Stopped: A signal came. Everything done so far is saved.
    """
    check_watch("petune.compare", watch)
    chosen = choose_executor(executor)
    config = CompareConfig.from_call(config, fields, "petune.compare(...)").completed()
    if config.datasets:
        raise ConfigError("petune.compare has one dataset, and datasets names others. Use petune.compare_datasets")
    config.run.check_one_fold()
    config.run.check_final_fit()
    run_dir = config.directory
    options = check_methods(config.methods)
    _check_directory(run_dir)
    runs = config.runs()
    stored = config.to_store()
    group = init_group()
    if not all(run.output and RunResult.exists(run.output) for run in runs):
        group.main_first(lambda: check_task_of_dataset(config.run))
        group.main_first(lambda: check_base_precision(config.run.base_precision))
        group.main_first(lambda: check_weights(config.run.backbone, config.run.weights))
    opened = open_run_dir(run_dir, stored, resume=True, command="compare", may_change=MAY_GROW, tables=TABLES)
    with group.on_main(opened):
        group.broadcast(lambda: _check_runs(runs))
        group.broadcast(lambda: write_config(run_dir, stored, "compare"))
        inputs = RunInputs(config.run.dataset, config.run.weights, config.run.data_dir, methods=options)
        group.broadcast(lambda: check_inputs(run_dir, inputs))
        group.broadcast(lambda: check_pixels_of_runs(runs))
        omitted = group.broadcast(lambda: _omitted_rows(config, run_dir))
        if omitted:
            watch(Note(f"not in the table this time: {', '.join(omitted)}. Their finished runs stay in {run_dir}"))
        results, reasons = _do_runs(runs, chosen, watch)
        return group.broadcast(lambda: _write(config, results, reasons))


def check_methods(methods: Sequence[str]) -> dict[str, TunerConfig]:
    """Build every method and return its options. A broken plugin is left out: its row will say so.

    Raises:
        UsageError: There is no such method, or its options are wrong.
    """
    options: dict[str, TunerConfig] = {}
    for method in methods:
        try:
            options[method] = build_tuner(method).config
        except UsageError:
            raise
        except PetuneError:
            continue
    return options


def check_comparison(config: CompareConfig) -> None:
    """Check what `compare` would refuse because of its directory and its methods, and write nothing.

    Raises:
        UsageError: See `compare`.
    """
    config.run.check_one_fold()
    config.run.check_final_fit()
    check_methods(config.methods)
    _check_directory(config.directory)
    check_run_dir(config.directory, config.to_store(), resume=True, command="compare", may_change=MAY_GROW)
    _check_runs(config.runs())


def _check_directory(run_dir: Path) -> None:
    check_kind(run_dir, "compare")
    if RunResult.exists(run_dir) or (run_dir / METRICS_FILE).exists():
        raise UsageError(f"{run_dir} holds a run. Use another output for the comparison", cli_hint=NEW_OUTPUT)
    other_tables = [name for name in TABLES if (run_dir / name).exists()]
    if other_tables and not (run_dir / CONFIG_FILE).exists():
        raise UsageError(
            f"{run_dir / other_tables[0]} exists and was not written by a comparison in {run_dir}. Use another output",
            cli_hint=NEW_OUTPUT,
        )


def _check_runs(runs: Sequence[RunConfig]) -> None:
    """Check the configuration of every run that has started, before another one trains."""
    for run in runs:
        if run.output is not None:
            check_config(run.output, run)


def _omitted_rows(config: CompareConfig, run_dir: Path) -> list[str]:
    """List methods and seeds of the existing table that were not asked for now."""
    try:
        rows = Comparison.read(run_dir).rows
    except CheckpointError:
        return []
    omitted = []
    for row in rows:
        seeds = [seed for seed in row.seeds if seed not in config.seeds]
        if row.method not in config.methods:
            omitted.append(row.method)
        elif seeds:
            omitted.append(seeds_by_method({row.method: seeds}))
    return omitted


def _do_runs(runs: Sequence[RunConfig], executor: Executor, watch: WatchRuns) -> tuple[list[RunResult], dict[str, str]]:
    """Do the runs; return the results in the order of the runs, and by method why it failed.

    A method that failed with one seed is not tried with the others.
    """
    results: dict[int, RunResult] = {}
    reasons: dict[str, str] = {}

    def started(index: int) -> RunStarted:
        run = runs[index]
        done = run.output is not None and RunResult.exists(run.output)
        return RunStarted(run.method, run.seed, index, len(runs), done)

    def report(event: Event | Started | FromRun) -> None:
        if isinstance(event, Started):
            watch(started(event.index))
        else:
            watch(RunEvent(started(event.index), event.event) if isinstance(event, FromRun) else event)

    for index, outcome in executor(runs, lambda run: run.method not in reasons, report):
        run = runs[index]
        if isinstance(outcome, RunResult):
            results[index] = outcome
        else:
            reasons.setdefault(run.method, outcome.reason)
            watch(Note(f"{run.method}, seed {run.seed} failed: {outcome.reason}"))
    return [results[index] for index in sorted(results)], reasons


def _write(config: CompareConfig, results: Sequence[RunResult], reasons: dict[str, str]) -> Comparison:
    by_method = {method: [result for result in results if result.method == method] for method in config.methods}
    task, metrics = _task_of(config, results)
    done_rows = [summarize(method, done, reasons.get(method, "")) for method, done in by_method.items()]
    found = with_differences(config, done_rows, metrics[0])
    comparison = Comparison(
        config=config,
        task=task,
        metric_info=metrics,
        rows=found.rows,
        conclusion=f"{found.conclusion} {note_of_formats(results)}".strip(),
        intervals=found.intervals,
        backbone=results[0].backbone_full_name if results else config.run.backbone,
        weights=results[0].weights if results else config.run.weights,
        provenance=results[-1].provenance if results else {},
        origins=origins_of(results),
        output=str(config.directory),
    )
    comparison.write(config.directory)
    return comparison


def _task_of(config: CompareConfig, results: Sequence[RunResult]) -> tuple[str, tuple[Metric, ...]]:
    """Return the task's name and its metrics, the main one first, also if no run finished."""
    if results:
        return results[0].task, results[0].metric_info
    task = build_task(BUILT_IN["class"] if config.run.task == AUTO_TASK else config.run.task)
    return task.name, choose_metrics(task, config.run.train.choose)
