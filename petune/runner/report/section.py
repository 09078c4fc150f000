"""A section of a report, and the parts that all kinds of sections have."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from petune.runner.file_names import CONFIG_FILE
from petune.runner.report.charts import Chart
from petune.runner.report.evaluations import Shown, shown_of
from petune.runner.report.find_runs import RunDirectory


@dataclass(frozen=True)
class Section:
    """A table with everything that belongs to it.

    Attributes:
        title: What was run, on what.
        about: Sentences on how, below the table.
        findings: What came out, in sentences, above the table.
        columns, rows: The table; a row that failed has only its method and the reason.
        notes: Sentences below the table.
        charts: The rows as figures.
        facts: Names and values: machine, versions, commit.
        commands: How the rows were made, and how to make them again.
        config: The configuration as YAML.
        shown: Images of the runs.
    """

    title: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    findings: Sequence[str] = ()
    notes: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    facts: Sequence[tuple[str, str]] = ()
    commands: Sequence[str] = ()
    config: str = ""
    shown: Sequence[Shown] = ()


def shown_in(runs: Sequence[RunDirectory], labels: Mapping[Path, str]) -> list[Shown]:
    """Return the evaluations of runs, and then their first images, those that several runs share once.

    A title has the seed where several runs have the same label.
    """
    names = [labels[run.path] for run in runs]
    shown: list[Shown] = []
    for run, name in zip(runs, names, strict=True):
        is_one_of_several = run.result is not None and names.count(name) > 1
        shown += shown_of(run.path, f"{name}, seed {run.result.seed}" if run.result and is_one_of_several else name)
    evaluations = [one for one in shown if one.is_evaluation]
    first_images: list[Shown] = []
    for one in shown:  # methods of a comparison see the same images
        if not one.is_evaluation and all(one.galleries != other.galleries for other in first_images):
            first_images.append(one)
    return [*evaluations, *first_images]


def command_of(kind: str, path: Path) -> str:
    """Return the command that continues or repeats what is in a directory."""
    return f"petune {kind} --config {shlex.quote(str(path / CONFIG_FILE))}"


def to_yaml(config: Mapping[str, Any]) -> str:
    """Return a configuration as YAML; nothing if it is empty."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True) if config else ""
