"""The sections of tables over several datasets or folds."""

from __future__ import annotations

from collections.abc import Sequence

from petune.base.metric import shown_metrics
from petune.base.text import plural
from petune.runner.comparison import origins_of
from petune.runner.cross_validate import CrossValidation
from petune.runner.report.charts import Curve, curve_charts
from petune.runner.report.find_runs import RunDirectory
from petune.runner.report.method_rows import shared_config, subject_of
from petune.runner.report.origin_facts import commands_of, facts_of, facts_of_origins
from petune.runner.report.section import Section, shown_in, to_yaml
from petune.runner.report.tables import list_seeds


def grid_section(directory: RunDirectory) -> Section:
    """Return the table of methods on several datasets, whose comparisons have sections of their own."""
    grid = directory.grid
    assert grid is not None
    columns, rows = grid.table()
    return Section(
        title=f"{directory.path.name}: {plural(len(rows), 'method')} on {plural(len(grid.columns), 'dataset')}",
        about=f"Grid in {directory.path}. {grid.about}",
        columns=columns,
        rows=rows,
        findings=grid.conclusions(),
        notes=[*grid.intervals(), *(f"Failed: {reason}" for reason in grid.failures())],
    )


def folds_section(directory: RunDirectory, runs: Sequence[RunDirectory]) -> Section:
    """Return the table of a cross-validation, with the curves and images of its runs."""
    validation = directory.folds
    assert validation is not None
    columns, rows = validation.table()
    runs = sorted(runs, key=lambda run: (int(run.config.get("fold") or 0), run.path))
    labels = {run.path: f"fold {run.config.get('fold', '?')}" for run in runs}
    curves = [Curve(labels[run.path], run.epochs) for run in runs if run.epochs]
    results = [run.result for run in runs if run.result]
    provenance = results[0].provenance if results else {}
    backbone = f"{results[0].backbone_full_name}, weights {results[0].weights}. " if results else ""
    return Section(
        title=f"Cross-validation of {validation.method}: {subject_of(runs[0]) if runs else validation.dataset}",
        about=f"Runs in {directory.path}: {backbone}{_about(validation)}",
        columns=columns,
        rows=rows,
        charts=curve_charts(f"folds {directory.path}", curves, validation.metric_info[0]),
        facts=facts_of_origins(origins_of(results)) or facts_of(provenance),
        commands=commands_of(provenance),
        config=to_yaml(shared_config(runs)) if runs else "",
        shown=shown_in(runs, labels),
    )


def _about(validation: CrossValidation) -> str:
    """Return what the numbers of a cross-validation are."""
    shown = [metric for metric in shown_metrics(validation.metric_info) if metric.name in validation.metrics]
    percent = ", ".join(metric.label for metric in shown if metric.percent)
    lower = ", ".join(metric.label for metric in shown if not metric.higher_is_better)
    sentences = [
        "Each image of the folds is tested once, in the fold that it is not trained in. The interval is Student's, "
        "over the folds."
    ]
    sentences += [f"A fold's value is the mean of {list_seeds(validation.seeds)}."] if validation.seeds[1:] else []
    sentences += [f"In percent: {percent}."] if percent else []
    sentences += [f"Lower is better: {lower}."] if lower else []
    return " ".join(sentences)
