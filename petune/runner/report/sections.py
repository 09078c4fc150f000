"""From what was found to what is shown: sections of rows that belong in one table, with their charts and origin."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from petune.data.manifest import MANIFEST_FILE
from petune.runner.compare import Comparison, Origin, origins_of, summarise
from petune.runner.report.charts import Chart, Curve, accuracy_chart, cost_charts, curve_charts
from petune.runner.report.find_runs import Found
from petune.runner.report.tables import cells, seeds_by_method, trial_table
from petune.runner.result import RunResult
from petune.runner.run_dir import COMPARE_FILE, INPUTS_FILE, leaves, noted

COLUMNS = (
    "method", "seeds", "tuned", "head", "% of backbone", "% of all", "adapter", "top-1", "top-5", "val", "lr",
    "epochs", "images/s", "step", "peak memory", "time a run",
)  # fmt: skip
NOT_IN_KEY = {"seed", "output", "resume"}


@dataclass(frozen=True)
class Section:
    """A table with all that belongs to it.

    Attributes:
        title: What was run on what.
        about: A sentence on how.
        columns, rows: The table; a row that failed has its method and the reason only.
        charts: What the rows look like.
        facts: Names and values: machine, versions, commit.
        commands: How it was made, and how to make it again.
        config: The configuration, as YAML.
    """

    title: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    charts: Sequence[Chart]
    facts: Sequence[tuple[str, str]]
    commands: Sequence[str]
    config: str


def sections_of(found: Sequence[Found]) -> list[Section]:
    """Comparisons and sweeps as they are, pretrainings together, other runs by backbone, its weights and dataset."""
    tables = {one.path.resolve(): one for one in found if one.kind in {"compare", "sweep"}}
    inside: dict[Any, list[Found]] = {place: [] for place in tables}
    groups: dict[tuple[str, ...], list[Found]] = {}
    for run in found:
        if run.kind not in {"run", "pretrain"}:
            continue
        above = run.path.resolve().parent
        if run.kind == "run" and above in tables:
            inside[above].append(run)
        elif run.epochs or run.result:
            groups.setdefault((run.kind, _what(run), *_backbone(run)), []).append(run)
    shown = []
    for place, one in tables.items():
        if one.kind == "compare":
            own, others = _of_table(one, inside[place])
            shown.append(_comparison(one, own))
            if others:
                shown.append(_beside(one, others))
    shown += [_sweep(one) for one in tables.values() if one.kind == "sweep" and one.table]
    shown += [_loose(kind, what, runs) for (kind, what, *_), runs in groups.items()]
    return [section for section in shown if section.rows or section.charts]


def _what(run: Found) -> str:
    source: Mapping[str, Any] = run.result.model_dump() if run.result else run.config
    return f"{source.get('backbone', '?')} on {source.get('dataset', '?')}"


def _backbone(run: Found) -> tuple[str, ...]:
    """What makes it another backbone than one of the same name."""
    fixed = ("weights", "image_size", "patch_size", "backbone_options", "head")
    return tuple(str(run.config.get(key, "")) for key in fixed)


def _of_table(one: Found, runs: Sequence[Found]) -> tuple[list[Found], list[Found]]:
    """The runs that a comparison's table is of, with those on their way; and finished ones that it leaves out."""
    rows = one.table["rows"] if one.table else []
    known = {(row["method"], seed) for row in rows for seed in row["seeds"]}

    def belongs(run: Found) -> bool:
        return not rows or run.result is None or (run.result.method, run.result.seed) in known

    return [run for run in runs if belongs(run)], [run for run in runs if not belongs(run)]


def _beside(one: Found, runs: Sequence[Found]) -> Section:
    loose = _loose("run", _what(runs[0]), runs)
    return replace(
        loose, title=f"{loose.title}, not in the table", about=f"Beside the table in {one.path}: {loose.about}"
    )


def _comparison(one: Found, runs: Sequence[Found]) -> Section:
    """The rows of compare.json; where there is none (yet), or it is damaged, the runs."""
    comparison = Comparison.model_validate(one.table) if one.table else None
    rows = [row.model_dump() for row in comparison.rows] if comparison else _rows([run for run in runs if run.result])
    title = _what(runs[0]) if runs else one.path.name
    about = f"Comparison in {one.path}."
    epochs: Any = "–"
    if comparison:
        shared = comparison.config.run
        title, epochs = f"{shared.backbone} on {shared.dataset}", shared.train.epochs
        about = f"Comparison in {one.path}: {comparison.backbone}, weights {comparison.weights}."
    commands = [f"petune compare --config {shlex.quote(str(one.path / COMPARE_FILE))}"] if not comparison else []
    facts = comparison.provenance if comparison else {}
    origins = comparison.origins if comparison else ()
    config = comparison.config.model_dump(mode="json") if comparison else {}
    return _section(title, about, runs, rows, facts, commands, config, epochs, origins)


def _loose(kind: str, what: str, runs: Sequence[Found]) -> Section:
    rows = _rows(runs)
    done = [run for run in runs if run.result]
    built = {f"{r.backbone_full_name}, weights {r.weights}" for run in done if (r := run.result)}
    title = f"Pretraining {what}" if kind == "pretrain" else what
    places = ", ".join(str(run.path) for run in runs)
    commands = [f"petune {kind} --config {shlex.quote(str(run.path / 'config.yaml'))}" for run in runs if run.config]
    results = [run.result for run in done if run.result]
    facts = results[0].provenance if results else {}
    chosen = " The last epoch is kept." if kind == "pretrain" else ""
    about = f"{'; '.join([*sorted(built), f'runs in {places}'])}.{chosen}"
    config = {key: value for key, value in runs[0].config.items() if all(run.config.get(key) == value for run in runs)}
    return _section(title, about, runs, rows, facts, commands, config, origins=origins_of(results))


def _sweep(one: Found) -> Section:
    """The trials, best first; only the best one has a test result."""
    assert one.table is not None
    columns, rows = trial_table(one.table)
    config, provenance = one.table["config"], one.table["provenance"]
    run = config["run"]
    title = f"Sweep of {run['method']}: {run['backbone']} on {run['dataset']}"
    about = f"Sweep in {one.path}, chosen on validation; only the best one reads test. Best first."
    return Section(title, about, columns, rows, [], _facts(provenance), _argv(provenance), _yaml(config))


def _section(
    title: str,
    about: str,
    runs: Sequence[Found],
    rows: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any] | None = None,
    commands: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    epochs: Any = "–",
    origins: Sequence[Origin] = (),
) -> Section:
    done = [row for row in rows if row["status"] == "done"]
    charts = [accuracy_chart(f"{title} {about}", done), *cost_charts(f"{title} {about}", done)] if done else []
    labels = _labels(runs)
    curves = [Curve(labels[run.path], run.epochs) for run in runs if run.epochs]
    charts[1:1] = curve_charts(f"{title} {about}", curves, [row["method"] for row in done])
    commands = [*_argv(provenance or {}), *commands]
    lines = [_cells(row, runs, epochs) for row in rows]
    facts = [fact for origin in origins for fact in _facts_of(origin)] or _facts(provenance or {})
    return Section(title, about, COLUMNS, lines, charts, facts, commands, _yaml(config or {}))


def _facts_of(origin: Origin) -> list[tuple[str, str]]:
    return [("runs", seeds_by_method(origin.runs)), *_facts(origin.provenance)]


def _label(run: Found) -> str:
    return run.result.method if run.result else str(run.config.get("method", run.path.name))


def _labels(runs: Sequence[Found]) -> dict[Path, str]:
    """Of each run its method, and in which of its settings it differs from other runs of the method."""
    settings = {run.path: leaves(_settings(run)) for run in runs}
    labels = {}
    for run in runs:
        alike = [settings[other.path] for other in runs if _label(other) == _label(run)]
        keys = dict.fromkeys(key for other in alike for key in other)
        differs = [key for key in keys if len({str(other.get(key)) for other in alike}) > 1 and key != "method"]
        said = ", ".join(f"{key.removeprefix('train.')}={settings[run.path].get(key)}" for key in differs)
        labels[run.path] = f"{_label(run)} ({said})" if said else _label(run)
    return labels


def _settings(run: Found) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key not in NOT_IN_KEY}


def _rows(runs: Sequence[Found]) -> list[dict[str, Any]]:
    """One row for the runs that differ in nothing but the seed, what they began with (`petune.began`) included."""
    alike: dict[tuple[str, str], dict[int, RunResult]] = {}
    labels = _labels(runs)
    for run in runs:
        if run.result:
            began = [noted(run.path / file) for file in (MANIFEST_FILE, INPUTS_FILE)]
            fixed = [run.result.lr, run.result.weights, _settings(run), began]
            key = labels[run.path], json.dumps(fixed, sort_keys=True, default=str)
            alike.setdefault(key, {}).setdefault(run.result.seed, run.result)  # run again, a seed tells nothing more
    rows = []
    for (label, _), by_seed in alike.items():
        results = list(by_seed.values())
        row = summarise(label, results).model_dump()
        rows.append(row | {"epochs": results[0].epochs, "step": _step(results)})
    return rows


def _step(results: Sequence[RunResult]) -> float | None:
    return statistics.fmean(r.step_time_s for r in results) if results else None


def _cells(row: Mapping[str, Any], runs: Sequence[Found], epochs: Any) -> list[str]:
    if row["status"] == "failed":
        return [row["method"], f"failed: {row['reason']}"]
    method, tuned, head, of_backbone, of_all, adapter, top1, top5, rate, memory, time = cells(row)
    alike = [r.result for r in runs if r.result and r.result.method == method and r.result.seed in row["seeds"]]
    step = row["step"] if "step" in row else _step(alike)
    val, lr = row["val_top1_mean"], row["lr"]
    return [
        method, ", ".join(map(str, row["seeds"])), tuned, head, of_backbone, of_all, adapter, top1, top5,
        "–" if val is None else f"{val:.2f}", "–" if lr is None else f"{lr:g}", str(row.get("epochs", epochs)), rate,
        "–" if step is None else f"{1000 * step:,.0f} ms", memory, time,
    ]  # fmt: skip


def _argv(provenance: Mapping[str, Any]) -> list[str]:
    words = provenance.get("argv") or []
    return [shlex.join(map(str, words))] if words else []


def _facts(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Machine, versions and commit, as far as they are known."""
    git, versions = provenance.get("git") or {}, provenance.get("versions") or {}
    dirty = " with uncommitted changes" if git.get("dirty") else ""
    micro = provenance.get("micro_batch_size")
    known = {
        "device": provenance.get("device"),
        "threads": provenance.get("threads"),
        "precision": provenance.get("precision"),
        "micro-batch": micro,
        "commit": f"{git['commit']}{dirty}" if git.get("commit") else None,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "python": provenance.get("python"),
        "platform": provenance.get("platform"),
    }
    return [(name, str(value)) for name, value in known.items() if value]


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True) if config else ""
