"""README.md, docs/results.md and compare.md show the committed results, and those are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tables

ROOT = Path(__file__).parents[1]


def test_tables_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(check=True) == 0, capsys.readouterr().err


def test_results_have_provenance_and_every_row_its_numbers() -> None:
    for file in (ROOT / "benchmarks" / "results").glob("*/compare.json"):
        comparison = json.loads(file.read_text())
        assert comparison["provenance"]["versions"]["torch"], file
        assert comparison["provenance"]["git"] is not None, file
        assert comparison["provenance"]["git"]["dirty"] is False, file
        for row in comparison["rows"]:
            assert row["status"] == "done", (file, row)
            seeds = comparison["config"]["seeds"]
            assert row["seeds"], (file, row)
            if row["seeds"] != seeds:  # a suite can be done in parts; the page must say which are missing
                assert set(row["seeds"]) < set(seeds), (file, row)
                assert f"`{row['method']}`" in file.with_name("NOTE.md").read_text(), (file, row)
            top1 = row["metrics"]["top1"] if "metrics" in row else row["top1"]  # results of before any task could run
            assert len(top1) == len(row["seeds"]), (file, row)
