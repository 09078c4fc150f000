"""Measure what averaging adapters gains: three seeds of a method, and the averages of them, on test.

python benchmarks/averaging.py cifar     # into runs/averaging and benchmarks/results/averaging.json
python benchmarks/averaging.py digits    # the same in minutes, on scikit-learn's digits
python benchmarks/tables.py              # the table in docs/results.md

`cifar` is a part of CIFAR-10: 50 training images per class, drawn by the seed; 1,000 other images, the same for every
seed, choose what is averaged; 2,500 images are test. A quarter of an hour on an idle core. `digits` has 10 training
images per class, which leaves something to gain, and 357 of test. The backbone is vit_nano.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from result_files import write_json

import petune
from petune.runner.provenance import provenance

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "averaging.json"
SEEDS = (0, 1, 2)
ROWS = {"train": 6_000, "test": 2_500}
"""Rows of CIFAR-10 that are used; a sixth of train is val."""
ADAPTFORMER = "adaptformer:bottleneck=16"
METHODS = {"lora": "lora", "adaptformer": ADAPTFORMER, "bitfit": "bitfit"}
COMMON_START = "adaptformer-continued"
"""AdaptFormer from one adapter, trained for an epoch with seed 0: the three seeds have a start in common."""
SETTINGS: dict[str, dict[str, Any]] = {
    "cifar": {"dataset": "cifar10", "val_fraction": 1 / 6, "shots": 50, "train": {"epochs": 5, "batch_size": 25}},
    "digits": {
        "dataset": "digits", "image_size": 16, "val_fraction": 0.25, "shots": 10,
        "train": {"epochs": 10, "batch_size": 20, "val_every": 5},
    },
}  # fmt: skip
AVERAGES: dict[str, dict[str, Any]] = {
    "uniform": {"algorithm": "uniform"},
    "greedy": {"algorithm": "greedy"},
    "wise_ft": {"algorithm": "wise_ft", "coefficients": [0.5]},
}


class Study:
    """The runs of one setting, and their averages.

    Args:
        name: The setting.
        folder: For runs and averages.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder / name
        self.options = {"backbone": "vit_nano", "device": "cpu", "precision": "fp32", **SETTINGS[name]}
        train = {**self.options.pop("train"), "precision": self.options.pop("precision")}
        self.options["train"] = train
        if name == "cifar":
            self.options["data_dir"] = self.cut_data()

    def cut_data(self) -> Path:
        """Write the first rows of CIFAR-10's Parquet files; return their data directory."""
        import pyarrow.parquet as pq

        target, source = self.folder / "data", Path(os.environ["PETUNE_DATA"]) / "cifar10"
        (target / "cifar10").mkdir(parents=True, exist_ok=True)
        for part, rows in ROWS.items():
            pq.write_table(
                pq.read_table(source / f"{part}.parquet").slice(0, rows), target / "cifar10" / f"{part}.parquet"
            )
        return target

    def runs(self, name: str) -> list[petune.RunResult]:
        """Train the seeds of a method, or read what is finished."""
        if name != COMMON_START:
            return [self._run(f"{name}-{seed}", METHODS[name], seed) for seed in SEEDS]
        start = self._run("start", ADAPTFORMER, 0, train={**self.options["train"], "epochs": 1, "val_every": 1})
        return [self._run(f"{name}-{seed}", ADAPTFORMER, seed, from_run=start.output) for seed in SEEDS]

    def _run(self, name: str, method: str, seed: int, **more: Any) -> petune.RunResult:
        given = {**self.options, "method": method, "seed": seed, "output": self.folder / name, "resume": True, **more}
        return petune.run(**given)

    def average(self, name: str, results: Sequence[petune.RunResult], label: str) -> dict[str, Any]:
        """Average the seeds of a method, and test it; a refusal is a result too."""
        output = self.folder / f"{name}-{label}"
        shutil.rmtree(output, ignore_errors=True)
        try:
            done = petune.average_adapters(
                [r.output for r in results],
                output,
                device="cpu",
                data_dir=self.options.get("data_dir"),
                **AVERAGES[label],
            )
        except petune.UsageError as error:
            return {"refused": str(error)}
        test = petune.evaluate(output, device="cpu", precision="fp32", data_dir=self.options.get("data_dir"))
        used = [adapter.coefficient for adapter in done.adapters]
        return {"top1": test.metrics["top1"], "val": done.val, "coefficients": used, "bytes": done.bytes}


def measure(name: str, folder: Path, methods: Sequence[str], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return options and rows of one setting, each row with the provenances of its runs and of its averages.

    Args:
        name: The setting.
        folder: For runs and averages.
        methods: What to measure.
        before: What this function returned earlier; rows of other methods stay as they are.

    Raises:
        SystemExit: The other rows have other options.
    """
    study = Study(name, folder)
    options = {key: value for key, value in study.options.items() if key != "data_dir"}
    num_test = len(petune.load_dataset(options["dataset"], study.options.get("data_dir")).test)
    rows = kept_rows(before, methods, {"options": options, "num_test": num_test}) if before else {}
    now = provenance(torch.device("cpu"))
    for method in methods:
        results = study.runs(method)
        singles = [result.metrics["top1"] for result in results]
        vals = [(result.val_metrics or {})["top1"] for result in results]
        rows[method] = {
            "seeds": singles,
            "mean": mean(singles),
            "best_on_val": singles[vals.index(max(vals))],
            "adapter_bytes": results[0].adapter_bytes,
            **{label: study.average(method, results, label) for label in AVERAGES},
            "provenance": [*(result.provenance for result in results), now],
        }
        print(method, json.dumps(rows[method]), flush=True)
    order = dict.fromkeys([*METHODS, COMMON_START, *rows])
    return {
        "setting": name,
        "options": options,
        "num_test": num_test,
        "rows": {key: rows[key] for key in order if key in rows},
    }


def kept_rows(before: Mapping[str, Any], methods: Sequence[str], conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows of other methods, with the provenance that an earlier version stored once for all of them."""
    rows = {key: row for key, row in before["rows"].items() if key not in methods}
    if other := [key for key in conditions if rows and before[key] != conditions[key]]:
        raise SystemExit(f"the rows of {', '.join(rows)} have other {', '.join(other)}. Measure all, without --only")
    return {key: {"provenance": row.get("provenance") or [before["provenance"]], **row} for key, row in rows.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "averaging", help="for runs and averages")
    parser.add_argument("--only", nargs="+", choices=[*METHODS, COMMON_START], help="other rows stay as they are")
    arguments = parser.parse_args()
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    before = known.get(arguments.setting) if arguments.only else None
    methods = arguments.only or [*METHODS, COMMON_START]
    measured = measure(arguments.setting, arguments.folder, methods, before)
    write_json(RESULT, {**known, arguments.setting: measured})
