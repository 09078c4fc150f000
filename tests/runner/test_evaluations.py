"""Evaluations in a report: the classes, the worst first, from what `petune eval` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from petune.runner.report.evaluations import shown_of


def _evaluation(run: Path, content: dict[str, Any]) -> None:
    (run / "eval-test").mkdir(exist_ok=True)
    (run / "eval-test" / "eval.json").write_text(json.dumps(content))


def _class(name: str, accuracy: float | None, mistaken_for: str | None = None) -> dict[str, Any]:
    return {"name": name, "num_images": 2000, "accuracy": accuracy, "precision": None,
            "mistaken_for": mistaken_for, "mistakes": 7}  # fmt: skip


def test_the_worst_class_is_first_and_one_without_images_last(tmp_path: Path) -> None:
    top1 = {"name": "top1", "label": "top-1", "percent": True}
    classes = [_class("cat", None), _class("dog", 90.0), _class("owl", 50.0, "dog")]
    _evaluation(tmp_path, {"classes": classes, "metric_info": [top1], "metrics": {"top1": 70.0}})
    (shown,) = shown_of(tmp_path, "vpt")
    assert shown.title == "vpt: evaluation on test, top-1 70.00 %"
    assert shown.classes is not None
    assert [row[0] for row in shown.classes.rows] == ["owl", "dog", "cat"]
    assert list(shown.classes.rows[0]) == ["owl", "2,000", "50.0", "–", "dog (7)"]


def test_many_classes_are_cut_and_other_tasks_show_their_metrics_of_classes(tmp_path: Path) -> None:
    _evaluation(tmp_path, {"classes": [_class(str(number), 100.0 - number) for number in range(60)]})
    (shown,) = shown_of(tmp_path, "vpt")
    assert shown.classes is not None
    assert (shown.classes.about, len(shown.classes.rows)) == ("The 50 worst of 60 classes", 50)
    infos = [{"name": name, "label": f"IoU of {name}", "percent": True, "per_class": True} for name in ("sky", "sea")]
    _evaluation(tmp_path, {"metric_info": infos, "metrics": {"sky": 80.0, "sea": 10.0}})
    (shown,) = shown_of(tmp_path, "vpt")
    assert shown.classes is not None
    assert list(map(list, shown.classes.rows)) == [["IoU of sea", "10.00 %"], ["IoU of sky", "80.00 %"]]


@pytest.mark.parametrize("content", [{"classes": [3]}, {"metric_info": [{"name": 1}]}, {"metric_info": 3}, {}])
def test_a_damaged_evaluation_is_left_out(tmp_path: Path, content: dict[str, Any]) -> None:
    _evaluation(tmp_path, content)
    assert shown_of(tmp_path, "vpt") == []
