"""`petune sweep`: trials compared on val, the best one tested once, interrupted sweeps resumed, shown by report."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import petune as library
from petune.base.errors import ConfigError, Diverged, Stopped
from petune.injector.registry import parse_method
from petune.runner.sweep.sweep_config import SweepConfig
from petune.runner.sweep.trials import Sweep, Trial

Run = Callable[..., Any]
Words = tuple[str, ...]
SEARCH = ("--search=bottleneck=2,4", "--search=train.lr=0.001,0.02")
WHERE = "sweep-adaptformer-vit_nano-digits-seed0"


def _timeless(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in {"time_s", "images_per_s"}} for row in table["rows"]]


def test_the_best_on_val_is_tested_and_no_other_trial(petune: Run, tiny: Words, tmp_path: Path) -> None:
    done = petune("sweep", "adaptformer", *SEARCH, *tiny)
    assert done.code == 0, done.err
    place = tmp_path / "runs" / WHERE
    table = json.loads((place / "sweep.json").read_text())
    rows = table["rows"]
    assert [row["params"] for row in rows] == [
        {"bottleneck": b, "train.lr": lr} for b in (2, 4) for lr in (0.001, 0.02)
    ]
    assert [row["lr"] for row in rows] == [0.001, 0.02, 0.001, 0.02]
    assert rows[0]["tuned"] < rows[2]["tuned"]
    best = max(rows, key=lambda row: row["val_metrics"]["top1"])
    assert table["best"] == best["trial"]
    assert [p.parent.name for p in place.glob("*/result.json")] == [f"trial-{best['trial']:03d}"]
    result = json.loads((place / f"trial-{best['trial']:03d}" / "result.json").read_text())
    assert result == table["result"]
    assert (result["val_metrics"], result["epoch"]) == (best["val_metrics"], best["epoch"])
    assert [p.parent.name for p in place.glob("*/checkpoints")] == [f"trial-{best['trial']:03d}"]
    assert f"best: trial {best['trial']}, " in done.err
    heading, _, first, *_ = done.out.splitlines()
    assert [cell.strip() for cell in heading.split("|")[1:4]] == ["trial", "bottleneck", "train.lr"]
    assert f"{result['metrics']['top1']:.2f}" in first

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is run twice")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["petune.runner.run"], "train", never)
        again = petune("sweep", "adaptformer", *SEARCH, *tiny, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out) == table
    assert json.loads(petune("sweep", "adaptformer", *SEARCH, *tiny, "--json", "--no-test").out)["result"] == result
    assert "[1/4] trial 0" in done.err
    # the best one is what `petune run` would have given
    config = place / f"trial-{best['trial']:03d}" / "config.yaml"
    alone = petune("run", "--config", config, "--output", "alone", "--json")
    assert json.loads(alone.out)["metrics"] == result["metrics"]


@pytest.mark.exhaustive
def test_a_trial_that_the_method_refuses_is_a_row(petune: Run, tiny: Words) -> None:
    over = ("--search=bottleneck=6,8", "--search=groups=3,2")  # the corners fit together: 6 in 3 groups, and 8 in 2
    done = petune("sweep", "repadapter", *over, *tiny, "--no-test", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [(*row["params"].values(), row["state"]) for row in rows] == [
        (6, 3, "done"), (6, 2, "done"), (8, 3, "failed"), (8, 2, "done"),
    ]  # fmt: skip
    assert rows[2]["reason"].startswith("ConfigError: ")
    assert "groups" in rows[2]["reason"]
    assert f"trial 2 failed: {rows[2]['reason']}" in " ".join(done.err.split())
    again = petune("sweep", "repadapter", *over, *tiny, "--no-test", "--json")
    assert json.loads(again.out)["rows"] == rows


@pytest.mark.exhaustive
def test_an_interrupted_sweep_ends_with_the_same_table(
    petune: Run, tiny: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("sweep", "adaptformer", *SEARCH, *tiny, "--no-test")
    whole = json.loads(petune(*words, "--output", "whole", "--json").out)
    original, begun = importlib.import_module("petune.runner.sweep.fit").train, []

    def stopping(config: Any, *rest: Any) -> Any:
        begun.append(config.output.name)
        if len(begun) == 3:
            raise Stopped("stopped by SIGTERM; what was done is saved, resume it with --resume")
        return original(config, *rest)

    monkeypatch.setattr(importlib.import_module("petune.runner.sweep.fit"), "train", stopping)
    stopped = petune(*words, "--output", "cut off")
    assert stopped.code == 75
    assert "petune sweep --config 'cut off/config.yaml' --output 'cut off'" in stopped.err
    half = json.loads((tmp_path / "cut off" / "sweep.json").read_text())
    assert [row["state"] for row in half["rows"]] == ["done", "done", "running"]
    assert not half["finished"]
    told = petune("report", "cut off", "--json")
    assert json.loads(told.out)["unfinished"] >= 1
    assert "2 trials done" in (tmp_path / "report.html").read_text()
    done = petune("sweep", "--config", "cut off/config.yaml", "--output", "cut off", "--json")
    assert done.code == 0, done.err
    assert begun == ["trial-000", "trial-001", "trial-002", "trial-002", "trial-003"]
    assert _timeless(json.loads(done.out)) == _timeless(whole)
    assert json.loads(done.out)["result"] is None
    assert list(tmp_path.glob("*/*/result.json")) == []


@pytest.mark.exhaustive
def test_a_moved_sweep_is_resumed_in_its_new_directory(petune: Run, tiny: Words, tmp_path: Path) -> None:
    assert petune("sweep", "linear", "--search=train.lr=0.01,0.1", *tiny, "--output", "first").code == 0
    (tmp_path / "first").rename(tmp_path / "moved")
    again = petune("sweep", "--config", "moved/config.yaml")
    assert again.code == 0, again.err
    assert "output: moved\n" in again.err
    assert "is the best on val and was tested before" in again.err
    assert "epoch 1/1" not in again.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.exhaustive
def test_a_sampled_sweep_can_be_resumed_with_more_trials_and_a_wider_range(
    petune: Run, tiny: Words, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    words = ("sweep", "linear", "--search=train.lr=1e-4..1e-1:log", *tiny, "--no-test", "--output", "there", "--json")
    two = json.loads(petune(*words, "--trials", 2).out)
    three = json.loads(petune(*words, "--trials", 3).out)
    assert three["rows"][:2] == two["rows"]
    assert (len(two["rows"]), len(three["rows"]), three["config"]["trials"]) == (2, 3, 3)
    wide = petune(*(word.replace("..1e-1", "..1") for word in words), "--trials", 4)
    assert wide.code == 0, wide.err
    assert json.loads(wide.out)["rows"][:3] == three["rows"]
    same = petune("sweep", "--config", "there/config.yaml", "--output", "there", "--json")
    assert json.loads(same.out)["rows"] == json.loads(wide.out)["rows"]
    before = (tmp_path / "there" / "config.yaml").read_text()
    for other in ("--search=train.lr=2..3", "--search=train.lr=1e-4..1:log --search=train.warmup=0,0.1"):
        done = petune("sweep", "linear", *other.split(), *tiny, "--output", "there")
        assert done.code == 2
        assert "trial 0 in there" in done.err
        assert "is outside the search" in done.err
    assert (tmp_path / "there" / "config.yaml").read_text() == before


@pytest.mark.exhaustive
def test_a_failed_trial_is_a_row_and_is_not_repeated(petune: Run, tiny: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    original, begun = importlib.import_module("petune.runner.sweep.fit").train, []

    def failing(config: Any, *rest: Any) -> Any:
        begun.append(config.train.lr)
        if config.train.lr == 0.5:
            raise Diverged("loss is nan")
        return original(config, *rest)

    monkeypatch.setattr(importlib.import_module("petune.runner.sweep.fit"), "train", failing)
    words = ("sweep", "linear", "--search=train.lr=0.5,0.01", *tiny)
    done = petune(*words)
    assert done.code == 0, done.err
    assert "trial 0 failed: Diverged: loss is nan" in done.err
    assert petune(*words).code == 0
    assert begun == [0.5, 0.01]
    none = petune("sweep", "linear", "--search=train.lr=0.5", *tiny, "--output", "none")
    assert none.code == 1
    assert "nothing was tested: all 1 failed: Diverged: loss is nan" in " ".join(none.err.split())
    page = petune("report", "runs", "none")
    assert page.code == 0
    html = Path("report.html").read_text()
    assert "Sweep of linear: vit_nano on digits" in html
    assert "failed: Diverged: loss is nan" in html


@pytest.mark.exhaustive
def test_a_trial_that_failed_because_of_data_is_repeated_on_resume(
    petune: Run, tiny: Words, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from petune.base.errors import DataError

    original = importlib.import_module("petune.runner.sweep.fit").train

    def failing(config: Any, *rest: Any) -> Any:
        if config.train.lr == 0.5:
            raise DataError("the cache cannot be written")
        return original(config, *rest)

    words = ("sweep", "linear", "--search=train.lr=0.5,0.01", *tiny, "--output", "there", "--no-test")
    with monkeypatch.context() as patched:
        patched.setattr(importlib.import_module("petune.runner.sweep.fit"), "train", failing)
        assert petune(*words).code == 0
    assert [row["state"] for row in _table(tmp_path)["rows"]] == ["failed", "done"]
    assert petune(*words).code == 0
    assert [row["state"] for row in _table(tmp_path)["rows"]] == ["done", "done"]
    assert petune(*words[:-1]).code == 0  # tested after all
    assert _table(tmp_path)["result"]["metrics"]["top1"] >= 0


@pytest.mark.exhaustive
def test_an_earlier_test_is_not_shown_for_a_new_best_trial(
    petune: Run, tiny: Words, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("sweep", "linear", *tiny, "--output", "there")
    assert petune(*words, "--search=train.lr=1e-6").code == 0
    assert _table(tmp_path)["result"] is not None

    def stopped(*args: Any, **rest: Any) -> Any:
        raise Stopped("a signal came")

    monkeypatch.setattr(sys.modules["petune.runner.sweep.search"], "run", stopped)
    assert petune(*words, "--search=train.lr=1e-6,0.3").code == 75
    table = _table(tmp_path)
    assert (table["best"], table["result"], table["finished"]) == (1, None, False)


def _table(place: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((place / "there" / "sweep.json").read_text())
    return table


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ("botleneck=2,4", "no such key: botleneck. Did you mean bottleneck"),
        ("bottleneck=2,0", "greater than or equal to 1"),
        ("train.lr=-1,1", "train.lr"),
        ("train.rate=1,2", "no such key: train.rate"),
        ("bottleneck=2,2", "missing or repeated"),
        ("bottleneck=2,,4", "Write KEY=VALUE,VALUE,… or KEY=LOW..HIGH[:log]"),
        ("bottleneck=", "Write KEY=VALUE,VALUE,…"),
        ("lr=1e-3,1e-2", "lr is a training option. Write train.lr"),
        (None, "for example:\n  petune sweep adaptformer --search "),
    ],
)
def test_a_search_that_makes_no_sense_is_refused_before_the_first_trial(
    search: str | None, message: str, petune: Run, tiny: Words, tmp_path: Path
) -> None:
    done = petune("sweep", "adaptformer", *([f"--search={search}"] if search else []), *tiny)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_a_config_that_the_command_accepts(petune: Run, tiny: Words, tmp_path: Path) -> None:
    done = petune("sweep", "adaptformer", "--search=bottleneck=2,4", "--trials=7", *tiny, "--dry-run")
    assert done.code == 0, done.err
    shown = yaml.safe_load(done.out)
    assert (shown["search"], shown["trials"], shown["run"]["method"]) == ({"bottleneck": [2, 4]}, 7, "adaptformer")
    assert "adaptformer:bottleneck=2" in done.err
    assert "adaptformer:bottleneck=4" in done.err
    assert not (tmp_path / "runs").exists()
    (tmp_path / "sweep.yaml").write_text(done.out)
    assert petune("sweep", "--config", "sweep.yaml", "--dry-run").out == done.out


@pytest.mark.exhaustive
def test_the_function_accepts_plain_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = {
        "method": "vpt:num_prompts=2", "backbone": "vit_nano", "weights": "none", "dataset": "digits", "device": "cpu",
        "backbone_options": {"depth": 2, "embed_dim": 48}, "shots": 5, "train": {"epochs": 1},
    }  # fmt: skip
    table = library.sweep(search={"deep": [True, False]}, run=run, output=tmp_path / "s", test=False)
    assert table.params in ({"deep": True}, {"deep": False})
    assert [row.tuned for row in table.rows] == [192, 96]
    assert table.config.trial(table.params).method in (
        "vpt:num_prompts=2,deep=true",
        "vpt:num_prompts=2,deep=false",
    )


@pytest.mark.parametrize("values", [(1, 1.0), (0, False, 0.5), (1, True)])
def test_equal_values_are_refused(values: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="the values of scale are missing or repeated"):
        SweepConfig.build({"search": {"scale": values}, "run": {"method": "adaptformer"}})


def test_an_option_of_none_is_kept() -> None:
    config = SweepConfig.build({"search": {"bottleneck": (4,)}, "run": {"method": "adaptformer:scale=null"}})
    method = config.trial({"bottleneck": 4}).method
    assert parse_method(method) == ("adaptformer", {"scale": None, "bottleneck": 4})


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A finished sweep, written before files and keys were renamed."""
    return Path(shutil.copytree(Path(__file__).parents[1] / "golden" / "v0" / "sweep", tmp_path / "sweep"))


def test_a_sweep_of_an_older_version_is_read_and_not_repeated(
    golden: Path, petune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads((golden / "sweep.json").read_text())
    monkeypatch.setattr(importlib.import_module("petune.runner.sweep.fit"), "train", None)
    monkeypatch.setattr(sys.modules["petune.runner.run"], "train", None)
    done = petune("sweep", "--config", golden / "config.yaml", "--json")
    assert done.code == 0, done.err
    table = json.loads(done.out)
    assert table["config"]["search"] == before["config"]["over"]
    assert [row["val_metrics"]["top1"] for row in table["rows"]] == [row["val_top1"] for row in before["rows"]]
    assert table["result"]["metrics"]["top1"] == before["result"]["top1"]


def test_a_sweep_of_an_older_version_can_be_extended(golden: Path, petune: Run) -> None:
    before = json.loads((golden / "sweep.json").read_text())
    done = petune("sweep", "--config", golden / "config.yaml", "--search=bottleneck=2,4,8", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [row["val_metrics"]["top1"] for row in rows[:2]] == [row["val_top1"] for row in before["rows"]]
    assert (rows[2]["params"], rows[2]["state"]) == ({"bottleneck": 8}, "done")


def test_an_interrupted_trial_of_an_older_version_is_finished(golden: Path, petune: Run) -> None:
    file = golden / "sweep.json"
    table = json.loads(file.read_text())
    numbers = table["rows"][1]
    empty = dict.fromkeys(("val_top1", "val_top5", "epoch", "lr", "tuned", "head", "percent_of_backbone"))
    table["rows"][1] = {**numbers, **empty, "state": "running"}
    file.write_text(json.dumps({**table, "finished": False, "result": None}))
    (golden / "trial-001" / "trial.json").unlink()
    done = petune("sweep", "--config", golden / "config.yaml", "--json")
    assert done.code == 0, done.err
    row = json.loads(done.out)["rows"][1]
    assert (row["state"], row["tuned"]) == ("done", numbers["tuned"])
    assert row["val_metrics"]["top1"] == pytest.approx(numbers["val_top1"], abs=1)


def test_a_sweep_without_a_metric_says_why_it_has_no_best_trial() -> None:
    metric = library.Metric(name="r2", label="R²")
    rows = [Trial(trial=i, params={"train.lr": 0.1}, state="done", val_metrics={}) for i in range(2)]
    config = SweepConfig.build({"search": {"train.lr": [0.1]}, "run": {"method": "linear"}})
    undefined = Sweep(config=config, output="there", rows=tuple(rows), metric_info=(metric,))
    assert undefined.best_trial() is None
    assert "R² is undefined on val" in undefined.why_no_best()
    failed = [row.model_copy(update={"state": "failed", "reason": f"no {row.trial}"}) for row in rows]
    assert "all 2 failed" in undefined.model_copy(update={"rows": tuple(failed)}).why_no_best()


def test_a_best_value_at_an_edge_of_the_search_is_remarked(tmp_path: Path) -> None:
    search = {
        "train.lr": (0.001, 0.01, 0.003),
        "bottleneck": (2, 4, 8),
        "input": ("residual", "norm"),
        "scale": {"low": 1, "high": 9},
    }
    sweep = Sweep.build(
        {
            "config": {"search": search, "run": {"method": "adaptformer"}},
            "rows": [
                {
                    "trial": 0,
                    "params": {"train.lr": 0.01, "bottleneck": 4, "input": "norm", "scale": 1},
                    "state": "done",
                }
            ],
            "best": 0,
            "output": str(tmp_path),
        }
    )
    found = sweep.at_an_edge()
    assert len(found) == 2
    assert found[0].startswith("train.lr=0.01 is the largest")
    assert found[1].startswith("scale=1 is the smallest")
