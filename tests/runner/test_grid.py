"""Comparisons on several datasets: means, ranks, and what is not averaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import petune
from petune.base.errors import ConfigError, UnknownName
from petune.base.metric import Metric
from petune.runner.grid import Grid, GridColumn
from petune.runner.report.find_runs import find_runs
from petune.training.events import Note
from tests.program import call
from tests.unbalanced import make_folder

TOP1 = Metric(name="top1", label="top-1", percent=True)
MAE = Metric(name="mae", label="MAE", higher_is_better=False)
TINY = (
    "--backbone",
    "vit_nano",
    "--weights",
    "none",
    "--set",
    "backbone_options={depth: 2, embed_dim: 24, num_heads: 2}",
)


def _column(dataset: str, metric: Metric = TOP1, **mean: float) -> GridColumn:
    task = "classification" if metric == TOP1 else "regression"
    return GridColumn(dataset=dataset, task=task, metric=metric, mean=mean)


def test_equal_values_share_their_ranks_and_lower_errors_are_better() -> None:
    assert _column("a", b=1.0, c=2.0, d=1.0).ranks("bcd") == {"c": 1, "b": 2.5, "d": 2.5}
    assert _column("a", MAE, b=1.0, c=2.0, d=1.5).ranks("bcd") == {"b": 1, "d": 2, "c": 3}


def test_the_best_and_those_that_cannot_be_told_apart_are_marked() -> None:
    column = _column("a", MAE, vpt=0.1, lora=0.2, linear=0.9)
    column = column.model_copy(
        update={"standing": {"vpt": "best", "lora": "tied", "linear": "below"}, "conclusion": "x"}
    )
    grid = Grid(methods=("vpt", "lora", "linear"), columns=(column,), output="out")
    assert [row[1] for row in grid.table()[1]] == ["0.1 *", "0.2 ~", "0.9"]
    assert "~ marks" in grid.page()
    assert "- a: x" in grid.page()


def test_values_of_different_tasks_are_not_averaged() -> None:
    one, other = _column("a", vpt=50.0, lora=40.0), _column("b", vpt=70.0, lora=80.0)
    grid = Grid(methods=("vpt", "lora"), columns=(one, other), output="out")
    assert (grid.mean("vpt"), grid.mean_rank("vpt")) == (60, 1.5)
    mixed = Grid(methods=("vpt", "lora"), columns=(one, _column("b", MAE, vpt=0.1, lora=0.2)), output="out")
    assert (mixed.mean("vpt"), mixed.mean_rank("vpt"), mixed.mean_rank("lora")) == (None, 1, 2)
    assert "mean" not in mixed.table()[0]
    assert "only ranks" in mixed.page()


def test_a_method_that_failed_on_a_dataset_has_no_rank() -> None:
    grid = Grid(
        methods=("vpt", "lora"),
        columns=(_column("a", vpt=50.0, lora=40.0), _column("b", vpt=70.0)),
        reasons={"b": {"lora": "no"}},
        output="out",
    )
    assert (grid.mean_rank("lora"), grid.mean("lora")) == (None, None)
    assert "lora on b: no" in grid.page()


def test_ranks_do_not_depend_on_methods_that_failed_elsewhere() -> None:
    """Ranks of other methods on one dataset are no reason to rank these two otherwise."""
    a, b = (1.0, 1.0, 3.0), (2.0, 2.0, 1.0)
    columns = [_column(str(i), MAE, a=x, b=y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    more = columns[2].model_copy(update={"mean": {"a": 3.0, "b": 1.0, "c": 2.0, "d": 2.5}})
    for last in (columns[2], more):
        grid = Grid(methods=("a", "b"), columns=(*columns[:2], last), output="out")
        assert [grid.mean_rank(method) for method in "abc"] == [pytest.approx(4 / 3), pytest.approx(5 / 3), None]


@pytest.mark.exhaustive
def test_a_grid_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "animals", dict.fromkeys(("airplane", "cat", "frog", "ship"), 8), test=4)
    monkeypatch.chdir(tmp_path)
    words: Any = (
        "compare", "linear", "bitfit", *TINY, "--dataset", "digits", "--dataset", "animals", "--shots", "4",
        "--epochs", "1", "--device", "cpu", "--output", "grid",
    )  # fmt: skip
    done = call(*words, capture=capsys)
    assert done.code == 0, done.err
    grid = json.loads((tmp_path / "grid" / "grid.json").read_text())
    assert [column["dataset"] for column in grid["columns"]] == ["digits", "folder:animals"]
    for column, directory in zip(grid["columns"], ("digits", "folder_animals"), strict=True):
        comparison = petune.Comparison.read(tmp_path / "grid" / directory)
        assert column["mean"] == {row.method: row.mean["top1"] for row in comparison.rows}
    assert "mean rank" in done.out
    again = call("compare", "--config", "grid/config.yaml", "--output", "grid", "--json", capture=capsys)
    assert (again.code, json.loads(again.out)) == (0, grid), again.err
    assert "finished before" in again.err
    assert {run.kind for run in find_runs([tmp_path / "grid"])} == {"grid", "compare", "run"}


def test_bad_datasets_are_refused_before_the_first_one_trains(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="digits"):
        petune.compare_datasets(methods=["linear"], datasets=["digits", "digit"], output=tmp_path / "out")
    with pytest.raises(ConfigError, match="no datasets"):
        petune.compare_datasets(methods=["linear"], output=tmp_path / "out")
    with pytest.raises(ConfigError, match="given twice"):
        petune.compare_datasets(methods=["linear"], datasets=["digits", "digits"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_datasets_that_are_not_named_again_leave_the_table_with_a_note(tmp_path: Path) -> None:
    for name in ("first", "second", "third"):
        make_folder(tmp_path / name, dict.fromkeys(("cat", "ship"), 4), test=2)
    options = {"depth": 1, "embed_dim": 8, "num_heads": 1}
    run = {"backbone": "vit_nano", "weights": "none", "backbone_options": options, "image_size": 8, "device": "cpu"}
    notes: list[Any] = []
    for names in (("first", "second"), ("first", "third")):
        datasets = tuple(f"folder:{tmp_path / name}" for name in names)
        grid = petune.compare_datasets(
            methods=("linear",), datasets=datasets, run=run | {"train": {"epochs": 1}},
            output=tmp_path / "grid", watch=notes.append,
        )  # fmt: skip
    assert [column.dataset for column in grid.columns] == [*datasets]
    (text,) = (note.text for note in notes if isinstance(note, Note) and "not in the table" in note.text)
    assert "second" in text


def test_a_bar_in_the_name_of_a_dataset_stays_in_its_cell() -> None:
    grid = Grid(methods=("vpt",), columns=(_column("table:a.csv,separator=|", vpt=50.0),), output="out")
    heading = next(line for line in grid.page().splitlines() if "separator" in line and line.startswith("|"))
    assert r"separator=\|" in heading
    assert r"\\|" not in heading
