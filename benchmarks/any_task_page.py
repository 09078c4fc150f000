"""The section of docs/tasks.md with the results of any_task.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from petune.base.metric import Metric
from petune.base.text import plural
from petune.runner.grid import Grid

RESULTS = Path(__file__).parent / "results" / "any_task"
BACKBONES = {
    "vit_nano": "`vit_nano`, AdaptFormer",
    "swin": "Swin of timm, `full`",
    "vit": "ViT of transformers, `full`",
}
DATA = {
    "unbalanced-none": "folder, 500/100/30/10 images of 4 classes",
    "unbalanced-inverse": "… `class_weights=inverse`",
    "unbalanced-effective": "… `class_weights=effective`",
    "unbalanced-sampling": "… `train.sampling=balanced`",
    "pairs": "table, two images side by side, two labels",
    "animals": "table, four images, number of animals",
    "folds": "… `--folds 5`, without the test images",
    "canvas": "table, digits on a photo, masks",
    "bands": "NPY, sign digits as 12 bands of 16 bits",
    "vtab": "VTAB's layout, 1,000 images of CIFAR-100",
    "fashion": "`torchvision:FashionMNIST`, 50 images a class",
    "hf": "`hf:` Parquet, sign digits, 50 images a class",
}
"""The cases, in the order of the table."""
Result = Mapping[str, Any]


def read_results(folder: Path) -> dict[tuple[str, str], Result]:
    """Read results, by case and backbone."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    return {(result["case"], result["backbone"]): result for result in results}


def section(folder: Path = RESULTS) -> str:
    """Return the tables, the commands, and the conditions; empty without results."""
    results = read_results(folder)
    if not results:
        return ""
    lines = [*_table(_rows(results)), ""]
    grid = results.get(("grid", "vit_nano"))
    if grid is not None:
        headings, rows = Grid(methods=grid["methods"], columns=grid["columns"], output="").table()
        lines += ["A grid of methods and datasets, with `vit_nano`; * marks the best method of a dataset:", ""]
        lines += [*_table([[_short(heading) for heading in headings], *rows]), ""]
    lines += ["A command for each; other backbones name `swin.yaml` or `vit.yaml`:", ""]
    measured = ([results[key] for key in results if key[0] == case] for case in (*DATA, "grid"))
    shown = [rows[-1] for rows in measured if rows]
    lines += [f"    {result['command']}" for result in shown]
    return "\n".join([*lines, "", _conditions(results)])


def _rows(results: Mapping[tuple[str, str], Result]) -> list[list[str]]:
    rows = [["data", "metric", "constant", *BACKBONES.values()]]
    for case, about in DATA.items():
        cells = [results.get((case, backbone)) for backbone in BACKBONES]
        measured = next((cell for cell in cells if cell is not None), None)
        for index, metric in enumerate(measured["metrics"] if measured else ()):
            constant = measured["constant"].get(metric["name"]) if measured else None
            row = [
                _number(metric, constant),
                *("-" if cell is None else _cell(cell["metrics"][index]) for cell in cells),
            ]
            rows.append([about if index == 0 else "", metric["label"], *row])
    return rows


def _cell(metric: Mapping[str, Any]) -> str:
    deviation = f" ± {_number(metric, metric['std'])}" if metric["std"] is not None else ""
    return _number(metric, metric["mean"]) + deviation


def _number(metric: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return "-"
    if metric["percent"]:
        return Metric(name=metric["name"], label=metric["label"], percent=True).number(value)
    return f"{value:.3f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    first, *others = rows
    rule = ["---", *["---:"] * (len(first) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (first, rule, *others)]


def _short(heading: str) -> str:
    """Return the heading of a grid's column without the folder of the data."""
    return heading.replace("folder:", "").replace("vtab:", "").rpartition("/")[2]


def _conditions(results: Mapping[tuple[str, str], Result]) -> str:
    commits: dict[tuple[str, int, str], set[str]] = {}
    for provenance in (result["provenance"] for result in results.values()):
        conditions = provenance["device"], provenance["threads"], provenance["versions"]["torch"]
        commits.setdefault(conditions, set()).add(provenance["git"]["commit"][:7])
    parts = [
        f"with {device}, {plural(threads, 'thread')}, torch {torch}, at commit{'s' * (len(several) > 1)} "
        f"{', '.join(sorted(several))}"
        for (device, threads, torch), several in commits.items()
    ]
    return f"Measured {'; '.join(parts)}. Every value: `benchmarks/results/any_task/`."
