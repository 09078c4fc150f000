"""`petune report`: every directory is in the page with its state, no markup can enter, other files are left alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import petune as library

Run = Callable[..., Any]


class Tags(HTMLParser):
    """Names of all elements, all attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two methods and two seeds."""
    output = tmp_path_factory.mktemp("compared") / "two"
    run = {
        "backbone": "vit_nano", "weights": "none", "backbone_options": {"depth": 2, "embed_dim": 48}, "device": "cpu",
        "dataset": "digits", "shots": 20, "train": {"epochs": 1, "precision": "fp32"},
    }  # fmt: skip
    values = {"methods": ("linear", "bitfit"), "seeds": (0, 1), "run": run, "output": output}
    library.compare(library.CompareConfig.build(values))
    return output


@pytest.fixture
def runs(compared: Path, tmp_path: Path) -> Path:
    """A directory with the comparison, a copy for each test."""
    shutil.copytree(compared, tmp_path / "there" / "two")
    return tmp_path / "there"


def test_a_comparison_is_a_table_with_charts_and_origin(petune: Run, runs: Path, tmp_path: Path) -> None:
    done = petune("report", "there", "--output", "page.html", "--json")
    assert done.code == 0, done.err
    counts = json.loads(done.out)
    assert (counts["done"], counts["unfinished"], counts["broken"]) == (5, 0, 0)
    page = Tags((tmp_path / "page.html").read_text())
    rows = json.loads((runs / "two" / "compare.json").read_text())["rows"]
    for row in rows:
        assert f"{row['mean']['top1']:.2f} ± {row['std']['top1']:.2f}" in page.text
    assert page.tags.count("svg") == 5  # accuracy, two of curves, time, memory
    assert page.tags.count("section") == 1
    assert "commit" in page.text
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.tags.count("img") == 2 * 16  # the first batch of each seed, which both methods see
    assert [a for a in page.attributes if a[0].startswith("on") or a[0] == "href"] == []
    assert all((a[1] or "").startswith("data:image/") for a in page.attributes if a[0] == "src")
    assert len(re.findall(r"https?://(?!www\.w3\.org)", (tmp_path / "page.html").read_text())) == 0


def test_unfinished_and_broken_directories_are_listed_and_names_are_escaped(
    petune: Run, runs: Path, tmp_path: Path
) -> None:
    hostile = "<img src=x onerror=alert(1)>&\u202e"
    run = next((runs / "two").glob("linear-*"))
    shutil.copytree(run, runs / hostile)
    (runs / hostile / "result.json").unlink()
    shutil.copytree(run, runs / "broken")
    (runs / "broken" / "result.json").write_text("{")
    result = json.loads((run / "result.json").read_text())
    shutil.copytree(run, runs / "named")
    (runs / "named" / "result.json").write_text(json.dumps(result | {"method": hostile}))
    done = petune("report", "there", "--json")
    assert done.code == 0, done.err
    counts = json.loads(done.out)
    assert (counts["done"], counts["unfinished"], counts["broken"]) == (6, 1, 1)
    page = Tags((tmp_path / "report.html").read_text())
    assert not [a for a in page.attributes if a[0].startswith("on") or a == ("src", "x")]
    assert "epochs done: 1 of 1" in page.text
    assert "is not the result of a finished run" in page.text
    assert "<img src=x onerror=alert(1)>&" in page.text
    assert "\u202e" not in page.text


def test_a_run_whose_metrics_are_undefined_is_shown_with_the_others(petune: Run, runs: Path, tmp_path: Path) -> None:
    run = next((runs / "two").glob("linear-*"))
    shutil.copytree(run, runs / "undefined")
    result = json.loads((run / "result.json").read_text())
    (runs / "undefined" / "result.json").write_text(json.dumps(result | {"metrics": {}, "method": "vpt"}))
    done = petune("report", "there", "--json")
    assert done.code == 0, done.err
    page = Tags((tmp_path / "report.html").read_text())
    assert "no metric is defined on test" in page.text
    assert f"{result['metrics']['top1']:.2f}" in page.text


def test_only_an_older_report_is_replaced(petune: Run, runs: Path, tmp_path: Path) -> None:
    assert petune("report", "there").code == 0
    assert petune("report", "there").code == 0
    (tmp_path / "mine.html").write_text("<html>my own</html>")
    done = petune("report", "there", "--output", "mine.html")
    assert (done.code, (tmp_path / "mine.html").read_text()) == (2, "<html>my own</html>")
    assert "mine.html exists and is not a page of `petune report`" in done.err
    (tmp_path / "empty").mkdir()
    none = petune("report", "empty")
    assert none.code == 2
    assert "no runs found below empty" in none.err


@pytest.mark.parametrize("damage", [{"rows": None}, {"rows": [{"params": None}]}, {"config": None}, {"finished": 3}])
def test_a_damaged_sweep_is_listed_as_broken(petune: Run, runs: Path, damage: dict[str, Any], tmp_path: Path) -> None:
    swept = runs / "swept"
    swept.mkdir()
    (swept / "config.yaml").write_text("# petune sweep --config config.yaml\ntrials: 2\n")
    (swept / "sweep.json").write_text(json.dumps(damage))
    done = petune("report", "there", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["broken"] == 1
    assert "sweep.json" in Tags((tmp_path / "report.html").read_text()).text


def _like(run: Path, to: Path, seed: int = 0, **settings: Any) -> Path:
    """Copy a run and change its seed and settings."""
    shutil.copytree(run, to)
    config = yaml.safe_load((to / "config.yaml").read_text())
    result = json.loads((to / "result.json").read_text())
    (to / "config.yaml").write_text(yaml.safe_dump({**config, "seed": seed, **settings}))
    weights = settings.get("weights", result["weights"])
    (to / "result.json").write_text(json.dumps({**result, "seed": seed, "weights": weights}))
    return to


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"seeds": []}, "1 problem in compare.json: - rows.0: a method that is done lacks seeds"),
        ({"mean": {}}, "1 problem in compare.json: - rows.0: a method that is done lacks mean"),
        (None, "8 problems in compare.json: - config: required - task: required"),
    ],
)
def test_a_damaged_comparison_is_broken_and_its_runs_are_shown(
    petune: Run, runs: Path, damage: dict[str, Any] | None, problem: str, tmp_path: Path
) -> None:
    file = runs / "two" / "compare.json"
    table = json.loads(file.read_text())
    table["rows"][0] |= damage or {}
    file.write_text(json.dumps({} if damage is None else table))
    done = petune("report", "there", "--output", "page.html", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["broken"] == 1
    page = Tags((tmp_path / "page.html").read_text())
    assert problem in " ".join(page.text.split())
    assert "linear" in page.text


def test_finished_runs_not_in_the_table_get_a_table_of_their_own(petune: Run, runs: Path, tmp_path: Path) -> None:
    """Means over other seeds do not belong in the same table."""
    narrowed = petune("compare", "linear", "--config", "there/two/config.yaml", "--seeds", "0", "--json")
    assert narrowed.code == 0, narrowed.err
    assert "directories: 5 finished, 0 unfinished, 0 broken" in petune("report", "there").err
    own, others = (tmp_path / "report.html").read_text().split("not in the table</h2>")
    cells = [re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", part) for part in (own, others)]
    assert ("bitfit" in cells[0], "bitfit" in cells[1]) == (False, True)
    assert "0, 1" in cells[1]
    assert "linear" in cells[1]  # its seed 1


def test_runs_on_other_images_or_weights_are_not_averaged(petune: Run, runs: Path, tmp_path: Path) -> None:
    run = next((runs / "two").glob("linear-*seed0"))
    (_like(run, tmp_path / "loose" / "a") / "dataset_manifest.json").write_text('{"train": {"cat": "61 3f0c"}}')
    (_like(run, tmp_path / "loose" / "b", seed=1) / "dataset_manifest.json").write_text('{"train": {"cat": "62 77aa"}}')
    assert petune("report", "loose").code == 0
    page = Tags((tmp_path / "report.html").read_text())
    assert "±" not in page.text.replace("mean ±", "")


def test_runs_with_different_settings_are_labeled(petune: Run, runs: Path, tmp_path: Path) -> None:
    run = next((runs / "two").glob("linear-*seed0"))
    _like(run, tmp_path / "loose" / "a")
    _like(run, tmp_path / "loose" / "b", shots=5)
    _like(run, tmp_path / "loose" / "c", weights="other.safetensors")
    assert petune("report", "loose").code == 0
    page = Tags((tmp_path / "report.html").read_text())
    assert page.tags.count("section") == 2
    assert "linear (shots=20)" in page.text
    assert "linear (shots=5)" in page.text
    assert "weights other.safetensors; runs in" in page.text


def test_no_run_is_omitted_because_of_its_name_or_a_link(petune: Run, runs: Path, tmp_path: Path) -> None:
    run = next((runs / "two").glob("linear-*seed0"))
    _like(run, tmp_path / "loose" / "adapter", seed=3)
    _like(run, tmp_path / "disk" / "big", seed=4)
    (tmp_path / "loose" / "big").symlink_to(tmp_path / "disk" / "big")
    (tmp_path / "loose" / "loop").symlink_to(tmp_path / "loose")
    done = petune("report", "loose", "--json")
    assert (done.code, json.loads(done.out)["done"]) == (0, 2)
    assert "3, 4" in Tags((tmp_path / "report.html").read_text()).text


def test_a_seed_that_ran_twice_is_counted_once(petune: Run, runs: Path, tmp_path: Path) -> None:
    run = next((runs / "two").glob("linear-*seed0"))
    for name in ("x", "x-2"):
        shutil.copytree(run, tmp_path / "loose" / name)
    assert petune("report", "loose").code == 0
    page = Tags((tmp_path / "report.html").read_text())
    assert "\u00b1" not in page.text.replace("mean ±", "")


def test_an_evaluation_is_in_the_report_of_its_run(petune: Run, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "run")
    assert petune("eval", "run", "--device", "cpu", "--precision", "fp32").code == 0
    done = petune("report", "run")
    assert done.code == 0, done.err
    page = Tags((tmp_path / "report.html").read_text())
    assert "evaluation on test" in page.text
    assert "Confusion matrix" in page.text
    assert "Classes, the worst first" in page.text
    assert "Worst mistakes" in page.text
    assert page.tags.count("figure") > 24
    for name, content in (
        ("eval-test/mistakes.json", "{"),
        ("eval-test/eval.json", '{"classes": 3}'),
        ("first_batch.json", "[]"),
    ):
        (tmp_path / "run" / name).write_text(content)
    (tmp_path / "run" / "eval-x").mkdir()
    hostile = {
        "galleries": [{"title": "t", "tiles": [{"title": "t", "images": [{"uri": "https://example.org/a.png"}]}]}]
    }
    (tmp_path / "run" / "eval-x" / "mistakes.json").write_text(json.dumps(hostile))
    (tmp_path / "run" / "eval-x" / "eval.json").write_text("{}")
    assert petune("report", "run").code == 0
    damaged = (tmp_path / "report.html").read_text()
    assert "example.org" not in damaged
    assert "Worst mistakes" not in damaged


def test_grids_and_cross_validations_have_tables(petune: Run, tmp_path: Path) -> None:
    mae = library.Metric(name="mae", label="MAE", higher_is_better=False)
    top1 = library.Metric(name="top1", label="top-1", percent=True)
    values = {"mae": (1.5, 2.5), "top1": (50.0, 60.0)}
    folds = library.CrossValidation(
        method="vpt", dataset="folder:pets", task="ages", metric_info=(mae, top1), metrics=values, output="folds"
    )
    columns = [
        {"dataset": "a,label=b", "task": "regression", "metric": mae.model_dump(), "mean": {"vpt": 2.0, "lora": 1.0}},
        {"dataset": "<b>", "task": "classification", "metric": top1.model_dump(), "mean": {"vpt": 80.0}},
    ]
    reasons = {"<b>": {"lora": "no <memory>"}}
    grid = library.Grid.build({"methods": ("vpt", "lora"), "columns": columns, "reasons": reasons, "output": "grid"})
    for name, file, table in (("f", "folds.json", folds), ("g", "grid.json", grid)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / file).write_text(table.model_dump_json())
    done = petune("report", "runs", "--json")
    assert (done.code, json.loads(done.out)["done"]) == (0, 2), done.err
    page = Tags((tmp_path / "report.html").read_text())
    texts = (
        "95 % interval",
        "fold 2",
        "mean rank",
        "1 *",
        "80.00 *",
        "Lower is better: MAE.",
        "lora on <b>: no <memory>",
    )
    for text in texts:
        assert text in page.text, text
    assert "Accuracies" not in page.text
    for name, file in (("f", "folds.json"), ("g", "grid.json")):
        (tmp_path / "runs" / name / file).write_text('{"output": 3}')
    damaged = petune("report", "runs", "--json")
    assert (damaged.code, json.loads(damaged.out)["broken"]) == (0, 2)
