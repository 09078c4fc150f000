"""Directories that older versions wrote: read in the words of today, resumed without training again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import petune
from petune.base.errors import UsageError
from petune.runner.comparison import Comparison
from petune.runner.file_names import CONFIG_FILE, INPUTS_FILE, MANIFEST_FILE, SPLITS_FILE
from petune.runner.migrations import migrate_run_dir, read_config, read_record, updated
from petune.runner.report.find_runs import find_runs
from petune.runner.report.page import write_page
from petune.runner.result import RunResult
from tests.program import call

V0 = Path(__file__).parents[1] / "golden" / "v0"
RUNS = ("adaptformer", "bitfit", "lora", "vpt")
VARIANT = "adaptformer:variant=paddle_study,bottleneck=2"


@pytest.fixture
def v0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the directories; the working directory is the one that they were written in."""
    shutil.copytree(V0, tmp_path / "v0")
    monkeypatch.chdir(tmp_path / "v0")
    return tmp_path / "v0"


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every training fail."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run is trained again")

    monkeypatch.setattr(sys.modules["petune.runner.run"], "train", refuse)


def _metrics(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("name", [*RUNS, "pretrain"])
def test_results_are_read(name: str) -> None:
    result = RunResult.read(V0 / name)
    written = json.loads((V0 / name / "result.json").read_text())
    assert (result.top1, result.output) == (written["top1"], written["output"])
    assert result.method == (VARIANT if name == "adaptformer" else written["method"])


@pytest.mark.parametrize("name", [*RUNS, "pretrain"])
def test_config_yaml_is_read(name: str) -> None:
    config = (petune.PretrainConfig if name == "pretrain" else petune.RunConfig).build(
        read_config(V0 / name / CONFIG_FILE)
    )
    assert config.shots == 10


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_from_its_checkpoint(name: str, v0: Path) -> None:
    before = RunResult.read(v0 / name)
    lines = _metrics(v0 / name)
    (v0 / name / "result.json").unlink()
    config = petune.RunConfig.build({**read_config(v0 / name / CONFIG_FILE), "output": v0 / name, "resume": True})
    result = petune.run(config)
    assert (result.top1, result.val_top1) == (pytest.approx(before.top1), pytest.approx(before.val_top1))
    assert _metrics(v0 / name) == lines  # nothing was trained
    assert {"inputs.json", "config.yaml"} <= {path.name for path in (v0 / name).iterdir()}
    assert not (v0 / name / "began.json").exists()


def test_a_pretraining_resumes_from_its_checkpoint(v0: Path) -> None:
    before = RunResult.read(v0 / "pretrain")
    (v0 / "pretrain" / "result.json").unlink()
    values = {**read_config(v0 / "pretrain" / CONFIG_FILE), "output": v0 / "pretrain", "resume": True}
    assert petune.pretrain(petune.PretrainConfig.build(values)).top1 == pytest.approx(before.top1)


def test_a_resumed_run_must_have_the_same_values(v0: Path) -> None:
    values = {**read_config(v0 / "bitfit" / CONFIG_FILE), "output": v0 / "bitfit", "resume": True}
    (v0 / "bitfit" / "result.json").unlink()
    with pytest.raises(UsageError, match="shots: 10 before, 11 now"):
        petune.run(petune.RunConfig.build({**values, "shots": 11}))


def test_the_command_line_takes_an_old_config(capsys: pytest.CaptureFixture[str], v0: Path) -> None:
    (v0 / "lora" / "result.json").unlink()
    done = call("run", "--config", "lora/config.yaml", "--output", "lora", "--resume", "--json", capture=capsys)
    assert done.code == 0, done.err
    assert json.loads(done.out)["metrics"]["top1"] == pytest.approx(RunResult.read(V0 / "lora").top1)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("no_training")
def test_a_comparison_is_finished_again_without_training(v0: Path) -> None:
    before = Comparison.read(v0 / "compare")
    config = petune.CompareConfig.build({**read_config(v0 / "compare" / CONFIG_FILE), "output": v0 / "compare"})
    again = petune.compare(config)
    assert [row.metrics["top1"] for row in again.rows] == [row.metrics["top1"] for row in before.rows]
    stored = yaml.safe_load((v0 / "compare" / CONFIG_FILE).read_text())
    assert (stored["methods"], stored["run"]["shots"]) == (["linear", "adaptformer:bottleneck=2"], 10)
    assert not (v0 / "compare" / "compare.yaml").exists()


@pytest.mark.exhaustive
@pytest.mark.usefixtures("no_training")
@pytest.mark.usefixtures("v0")
def test_the_command_line_resumes_an_old_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    done = call("compare", "--config", "compare/config.yaml", "--output", "compare", "--json", capture=capsys)
    assert done.code == 0, done.err
    assert [row["status"] for row in json.loads(done.out)["rows"]] == ["done", "done"]


@pytest.mark.exhaustive
def test_a_comparison_can_get_another_method(v0: Path) -> None:
    values = {**read_config(v0 / "compare" / CONFIG_FILE), "output": v0 / "compare"}
    values["methods"] = [*values["methods"], "bitfit"]
    rows = petune.compare(petune.CompareConfig.build(values)).rows
    assert [row.status for row in rows] == ["done"] * 3


@pytest.mark.exhaustive
def test_runs_of_a_renamed_variant_are_found_again(v0: Path) -> None:
    """Of a method whose option has another name today, which is part of the name of the run directory."""
    old_name = "adaptformer_variant=seed_bottleneck=2-vit_nano-digits-seed0"
    shutil.copytree(v0 / "adaptformer", v0 / "compare" / old_name)
    config = yaml.safe_load((v0 / "compare" / "compare.yaml").read_text())
    config["methods"].append("adaptformer:variant=seed,bottleneck=2")
    (v0 / "compare" / "compare.yaml").write_text(yaml.safe_dump({**config, "seeds": [0]}))
    values = {**read_config(v0 / "compare" / CONFIG_FILE), "output": v0 / "compare"}
    lines = _metrics(v0 / "compare" / old_name)
    rows = {row.method: row for row in petune.compare(petune.CompareConfig.build(values)).rows}
    assert rows[VARIANT].metrics["top1"] == (RunResult.read(V0 / "adaptformer").top1,)
    run_dir = v0 / "compare" / "adaptformer_variant=paddle_study_bottleneck=2-vit_nano-digits-seed0"
    assert _metrics(run_dir) == lines


@pytest.mark.exhaustive
def test_a_report_shows_all_of_them(tmp_path: Path) -> None:
    directories = find_runs([V0])
    assert {directory.state for directory in directories} == {"done"}
    assert sorted({directory.kind for directory in directories}) == ["compare", "pretrain", "run", "sweep", "trial"]
    page = write_page([V0], tmp_path / "page.html")
    assert (page.done, page.unfinished, page.broken) == (len(directories), 0, 0)
    text = (tmp_path / "page.html").read_text()
    assert "variant=paddle_study" in text
    assert "train_per_class" not in text.partition("<details>")[0]


def test_an_old_folder_manifest_and_record_are_read_and_renamed(tmp_path: Path) -> None:
    manifest = {"train": {"cat": "61 3f0c"}}
    (tmp_path / "pictures.json").write_text(json.dumps(manifest))
    (tmp_path / "began.json").write_text(json.dumps({"lr": 0.1}))
    assert read_record(tmp_path / MANIFEST_FILE) == manifest
    migrate_run_dir(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST_FILE, INPUTS_FILE}
    assert read_record(tmp_path / MANIFEST_FILE) == manifest
    assert read_record(tmp_path / INPUTS_FILE) == {"lr": 0.1}


def test_names_of_classes_metrics_and_options_are_not_old_keys(tmp_path: Path) -> None:
    words = {"over": 1, "at_once": 2, "train_per_class": 3}
    for name in (MANIFEST_FILE, SPLITS_FILE):
        (tmp_path / name).write_text(json.dumps({"train": words}))
        assert read_record(tmp_path / name) == {"train": words}
    (tmp_path / INPUTS_FILE).write_text(json.dumps({"options": {"mine": words}, "task": {"options": words}}))
    assert read_record(tmp_path / INPUTS_FILE) == {"options": {"mine": words}, "task": {"options": words}}
    assert updated({"metrics": words, "lrs": words}) == {"metrics": words, "lrs": words}
    table = updated({"config": {"over": words, "run": {"train_per_class": 5}}, "rows": [{"params": words}]})
    assert table == {"config": {"search": words, "run": {"shots": 5}}, "rows": [{"params": words}]}


def test_a_comparison_on_a_class_called_over_is_repeated_and_evaluated(tmp_path: Path) -> None:
    for name, level in (("over", 200), ("under", 40)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (8, 8), (level + number,) * 3).save(tmp_path / "images" / name / f"{number}.png")
    options: dict[str, Any] = {
        "methods": ("linear",), "output": tmp_path / "table",
        "run": {
            "dataset": f"folder:{tmp_path / 'images'}", "backbone": "vit_nano", "weights": "none", "image_size": 8,
            "backbone_options": {"depth": 1, "embed_dim": 24, "num_heads": 2}, "device": "cpu",
            "train": {"epochs": 1, "batch_size": 8},
        },
    }  # fmt: skip
    first = petune.compare(**options)
    assert petune.compare(**options) == first
    (run_dir,) = (file.parent for file in (tmp_path / "table").glob("*/result.json"))
    assert petune.evaluate(run_dir, device="cpu").top1 == pytest.approx(RunResult.read(run_dir).top1)


def test_values_are_updated_where_they_mean_the_study() -> None:
    old = {
        "backbone": "vit_seed",
        "seed": 3,
        "dataset": "folder:variant=seed",
        "train": {"augment": "seed"},
        "over": {"variant": ["seed", "official"]},
        "lrs": {"adaptformer:variant=seed": 0.1},
        "provenance": {"argv": ["--train-per-class", "adaptformer:variant=seed"]},
    }
    assert updated(old) == {
        "backbone": "vit_paddle_study",
        "seed": 3,
        "dataset": "folder:variant=seed",
        "train": {"augment": "paddle_study"},
        "search": {"variant": ["paddle_study", "official"]},
        "lrs": {"adaptformer:variant=paddle_study": 0.1},
        "provenance": {"argv": ["--train-per-class", "adaptformer:variant=seed"]},
    }
    assert updated(updated(old)) == updated(old)
