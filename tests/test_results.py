"""The tables in README.md and docs/results.md are those of the committed results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_fresh() -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
            if row["seeds"] != seeds:  # a suite goes on in pieces; the page must say which are missing
                assert set(row["seeds"]) < set(seeds), (file, row)
                assert f"`{row['method']}`" in file.with_name("NOTE.md").read_text(), (file, row)
            assert len(row["top1"]) == len(row["seeds"]), (file, row)
