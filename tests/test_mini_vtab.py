"""The small VTAB: its datasets have VTAB's layout, and its page ranks the methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mini_vtab_data
import mini_vtab_page
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

PIECES = ["mini-vtab-a", "mini-vtab-b", "mini-vtab-c", "mini-vtab-d"]


def _comparison(**top1: float) -> dict[str, Any]:
    row = {"status": "done", "percent_of_backbone": 1.0, "seeds": [0, 1]}
    return {"rows": [row | {"method": method, "mean": {"top1": value}} for method, value in top1.items()]}


def _results() -> dict[str, dict[str, Any]]:
    values = [(50, 60, 70), (50, 60, 60), (50, 40, 70), (50, 60, 70)]
    return {p: _comparison(linear=a, vpt=b, full=c) for p, (a, b, c) in zip(PIECES, values, strict=True)}


def test_digits_are_written_in_vtabs_layout(tmp_path: Path) -> None:
    mini_vtab_data.write("digits", tmp_path, tmp_path / "digits")
    lists = {file.stem: file.read_text().splitlines() for file in (tmp_path / "digits").glob("*.txt")}
    assert {name: len(rows) for name, rows in lists.items()} == {
        "train800": 800, "val200": 200, "train800val200": 1000, "test": 359,
    }  # fmt: skip
    assert not set(lists["train800"]) & set(lists["val200"])
    labels = [row.rpartition(" ")[2] for row in lists["train800val200"]]
    assert [labels.count(str(digit)) for digit in range(10)] == [100] * 10


def test_each_digit_is_written_with_its_own_label_and_into_one_split(tmp_path: Path) -> None:
    mini_vtab_data.write("digits", tmp_path, tmp_path / "digits")
    known = load_digits()
    label_of = {
        image.astype(int).tobytes(): int(label) for image, label in zip(known.images, known.target, strict=True)
    }
    found: dict[str, set[bytes]] = {}
    for name in ("train800val200", "test"):
        for line in (tmp_path / "digits" / f"{name}.txt").read_text().splitlines():
            path, _, label = line.rpartition(" ")
            pixels = np.asarray(Image.open(tmp_path / "digits" / path))[..., 0]
            ink = np.rint(pixels / 255 * 16).astype(int).tobytes()
            assert label_of[ink] == int(label)
            found.setdefault(name, set()).add(ink)
    assert not found["train800val200"] & found["test"]


def test_ranks_are_means_over_datasets_and_equal_values_share_theirs() -> None:
    table = mini_vtab_page.read_table(PIECES, _results())
    assert table is not None
    assert table.ranked == ["full", "vpt", "linear"]
    assert table.rank == pytest.approx({"full": 4.5 / 4, "vpt": (2 + 1.5 + 3 + 2) / 4, "linear": 11 / 4})
    # Demšar, 2006, table 5: q of 3 methods at 0.05 is 2.343
    assert table.critical_difference == pytest.approx(2.343 * (3 * 4 / (6 * 4)) ** 0.5, abs=1e-3)


def test_the_page_says_what_it_found_or_what_is_missing() -> None:
    text = "\n".join(mini_vtab_page.section(PIECES, _results()))
    assert "`full` has the best mean rank (1.1)" in text
    assert "| `vpt` | 2.1 | 55.00 | 60.00 | 60.00 | 40.00 | 60.00 |" in text
    partly = {name: result for name, result in _results().items() if name != PIECES[0]}
    assert "3 of 4 datasets measured" in "\n".join(mini_vtab_page.section(PIECES, partly))


def test_the_cost_is_that_of_steps_in_turns(tmp_path: Path) -> None:
    ratios = {"petune adaptformer": {"median": 1.0}, "petune full": {"median": 1.7}, "timm full, fp32": {"median": 2.5}}
    file = tmp_path / "speed.json"
    file.write_text(json.dumps({"steps": {"vit_nano": {"petune_is_faster_by": ratios}}}))
    assert mini_vtab_page.step_times(file) == {"adaptformer": 1.0, "full": 1.7, "timm full, fp32": 2.5}
    assert mini_vtab_page.step_times(tmp_path / "none.json") == {}


@pytest.mark.parametrize("row", [{"status": "failed", "mean": {}, "seeds": []}, {"status": "done", "seeds": [0]}])
def test_a_method_that_is_incomplete_on_a_dataset_is_left_out_and_named(row: dict[str, Any]) -> None:
    """It failed there, or has fewer seeds than the others."""
    results = _results()
    for piece in (PIECES[0], PIECES[2]):
        results[piece]["rows"].append(_comparison(lora=99.0)["rows"][0])
    results[PIECES[1]]["rows"].append(_comparison(lora=99.0)["rows"][0] | row)
    table = mini_vtab_page.read_table(PIECES, results)
    assert table is not None
    assert "lora" not in table.rank
    assert "measured: `lora` (no complete b and d)." in "\n".join(mini_vtab_page.section(PIECES, results))


@pytest.mark.parametrize("missing", ["linear", "vpt"])
def test_without_three_methods_and_the_linear_probe_the_page_says_what_it_needs(missing: str) -> None:
    results = _results()
    for comparison in results.values():
        comparison["rows"] = [row for row in comparison["rows"] if row["method"] != missing]
    text = mini_vtab_page.section(PIECES, results)[0]
    assert "4 of 4 datasets measured so far** (a with 2 methods" in text
    assert "needs three methods, `linear` among them" in text
