"""The sections of a report: a table with its charts and its origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from petune.base.metric import Metric
from petune.runner.comparison import Comparison, origins_of
from petune.runner.report.charts import Curve, cost_charts, curve_charts, metric_chart
from petune.runner.report.find_runs import RunDirectory
from petune.runner.report.method_rows import (
    backbone_of,
    labels_of,
    metric_info_of,
    rows_of,
    shared_config,
    subject_of,
    task_of,
)
from petune.runner.report.origin_facts import commands_of, facts_of, facts_of_origins
from petune.runner.report.section import Section, command_of, shown_in, to_yaml
from petune.runner.report.several_sections import folds_section, grid_section
from petune.runner.report.tables import (
    UNKNOWN,
    cells,
    describe_numbers,
    method_columns,
    ranked,
    trial_table,
    with_difference,
)


def sections_of(directories: Sequence[RunDirectory]) -> list[Section]:
    """Return a section per grid, comparison, sweep and cross-validation, and one for other runs on the same dataset."""
    comparisons = {d.path.resolve(): d for d in directories if d.kind == "compare"}
    sweeps = [d for d in directories if d.kind == "sweep"]
    validations = {d.path.resolve(): d for d in directories if d.folds is not None}
    tables = {*comparisons, *validations, *(sweep.path.resolve() for sweep in sweeps)}
    inside: dict[Path, list[RunDirectory]] = {path: [] for path in tables}
    groups: dict[tuple[str, ...], list[RunDirectory]] = {}
    for run in directories:
        parent = run.path.resolve().parent
        if run.kind == "run" and parent in tables:
            inside[parent].append(run)
        elif run.kind in ("run", "pretrain") and (run.epochs or run.result):
            groups.setdefault((run.kind, subject_of(run), *backbone_of(run), *task_of(run)), []).append(run)
    sections = [grid_section(directory) for directory in directories if directory.grid is not None]
    for path, directory in comparisons.items():
        sections += _comparison_sections(directory, inside[path])
    sections += [folds_section(directory, inside[path]) for path, directory in validations.items()]
    sections += [_sweep_section(directory) for directory in sweeps if directory.sweep]
    sections += [_runs_section(runs) for runs in groups.values()]
    return [section for section in sections if section.rows or section.charts]


def _comparison_sections(directory: RunDirectory, runs: Sequence[RunDirectory]) -> list[Section]:
    """Return the table of a comparison, and one of finished runs in its directory that are not in the table."""
    comparison = directory.comparison
    if comparison is None:  # not finished, or damaged
        return [_unfinished_section(directory, runs)]
    in_table = {(row.method, seed) for row in comparison.rows for seed in row.seeds}
    own = [run for run in runs if run.result is None or (run.result.method, run.result.seed) in in_table]
    others = [run for run in runs if run not in own]
    sections = [_comparison_section(directory.path, comparison, own)]
    if others:
        section = _runs_section(others)
        about = f"Other runs in {directory.path}: {section.about}"
        sections.append(replace(section, title=f"{section.title}, not in the table", about=about))
    return sections


def _comparison_section(path: Path, comparison: Comparison, runs: Sequence[RunDirectory]) -> Section:
    run = comparison.config.run
    rows = [row.model_dump() for row in comparison.rows]
    rows = [row | {"epochs": row["epochs"] or run.train.epochs} for row in rows]  # older tables lack it
    return _methods_section(
        title=f"{path.name}: {run.backbone} on {run.dataset}",
        about=f"Comparison in {path}: {comparison.backbone}, weights {comparison.weights}.",
        metrics=comparison.metric_info,
        rows=rows,
        runs=runs,
        facts=facts_of_origins(comparison.origins) or facts_of(comparison.provenance),
        commands=commands_of(comparison.provenance),
        config=to_yaml(comparison.config.model_dump(mode="json")),
        findings=[comparison.conclusion] if comparison.conclusion else [],
        notes=[comparison.intervals] if comparison.intervals else [],
    )


def _unfinished_section(directory: RunDirectory, runs: Sequence[RunDirectory]) -> Section:
    return _methods_section(
        title=f"{directory.path.name}: {subject_of(runs[0])}" if runs else directory.path.name,
        about=f"Comparison in {directory.path}.",
        metrics=metric_info_of(runs),
        rows=rows_of(runs),
        runs=runs,
        commands=[command_of("compare", directory.path)],
    )


def _runs_section(runs: Sequence[RunDirectory]) -> Section:
    kind, subject = runs[0].kind, subject_of(runs[0])
    results = [run.result for run in runs if run.result]
    backbones = sorted({f"{result.backbone_full_name}, weights {result.weights}" for result in results})
    paths = ", ".join(str(run.path) for run in runs)
    about = "; ".join([*backbones, f"runs in {paths}"])
    provenance = results[0].provenance if results else {}
    return _methods_section(
        title=f"Pretraining {subject}" if kind == "pretrain" else subject,
        about=f"{about}. The last epoch is kept." if kind == "pretrain" else f"{about}.",
        metrics=metric_info_of(runs),
        rows=rows_of(runs),
        runs=runs,
        facts=facts_of_origins(origins_of(results)) or facts_of(provenance),
        commands=[*commands_of(provenance), *(command_of(kind, run.path) for run in runs if run.config)],
        config=to_yaml(shared_config(runs)),
    )


def _sweep_section(directory: RunDirectory) -> Section:
    assert directory.sweep is not None
    sweep = directory.sweep.model_dump(mode="json")
    columns, rows = trial_table(sweep)
    run = sweep["config"]["run"]
    return Section(
        title=f"Sweep of {run['method']}: {run['backbone']} on {run['dataset']}",
        about=f"Sweep in {directory.path}, best first. Trials are chosen on validation; only the best one reads test.",
        columns=columns,
        rows=rows,
        facts=facts_of(sweep["provenance"]),
        commands=commands_of(sweep["provenance"]),
        config=to_yaml(sweep["config"]),
    )


def _methods_section(
    *,
    title: str,
    about: str,
    metrics: Sequence[Metric],
    rows: Sequence[Mapping[str, Any]],
    runs: Sequence[RunDirectory],
    **rest: Any,
) -> Section:
    """Return a section whose rows are methods, best first, with their charts and the curves of the runs."""
    rows = ranked(rows, metrics)
    done = [row for row in rows if row["status"] == "done"]
    labels = labels_of(runs)
    curves = [Curve(labels[run.path], run.epochs) for run in runs if run.epochs]
    salt = f"{title} {about}"
    charts = [metric_chart(salt, done, metrics[0])] if done else []
    charts += curve_charts(salt, curves, metrics[0], [row["method"] for row in done])
    charts += cost_charts(salt, done) if done else []
    every = with_difference(method_columns(metrics, rows), metrics, rows)
    columns = {name: text for name, text in every.items() if any(text(row) != UNKNOWN for row in done)}
    failed = {row["method"]: f"failed: {row['reason']}" for row in rows if row["status"] == "failed"}
    texts = [[m, failed[m]] if (m := row["method"]) in failed else cells(row, columns) for row in rows]
    about = f"{about} {describe_numbers(metrics, rows)}" if done else about
    return Section(title, about, list(columns), texts, charts=charts, shown=shown_in(runs, labels), **rest)
