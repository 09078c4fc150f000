"""Write results whole, and keep those of `--smoke` and `--quick` apart from measured ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from petune.base.files import replace_file

ROOT = Path(__file__).resolve().parents[1]


def speed_folder(is_trial: bool) -> Path:
    """Return the folder of measured steps, or that of trials."""
    return ROOT / "runs" / "speed_quick" if is_trial else ROOT / "benchmarks" / "results" / "speed"


def write_json(file: Path, values: Any) -> None:
    """Write `values` to `file`, which a kill leaves as it was; its folder is created."""
    replace_file(file, (json.dumps(values, indent=1) + "\n").encode())


def read_measured(file: Path) -> dict[str, Any]:
    """Read a result that a page may show.

    Raises:
        SystemExit: It is one of `--smoke` or `--quick`.
    """
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if result.get("smoke"):
        raise SystemExit(f"{file} is the result of a trial, not a measurement. Remove it, or measure without --smoke")
    return result


def need_same_size(file: Path, smoke: bool) -> None:
    """Check that a trial replaces no measurement, and a measurement no trial.

    Args:
        file: What will be written.
        smoke: It will be the result of a trial.

    Raises:
        SystemExit: There is a result of the other size.
    """
    if file.exists() and bool(json.loads(file.read_text(encoding="utf-8")).get("smoke")) != smoke:
        kind = "a measurement" if smoke else "a trial"
        raise SystemExit(f"{file} is the result of {kind}, which this one would replace. Choose another --output")
