"""Measure petune.AdapterBank on ViT-S/16 at 224: batches of several adapters, loading, memory.

    python benchmarks/adapter_bank.py             # writes results/adapter_bank.json and docs/many-tasks.md
    python benchmarks/adapter_bank.py --page      # rewrites the table from the results
    python benchmarks/adapter_bank.py --only vpt  # measures one method and keeps the rows of the others

The weights are random, since neither time nor memory depends on them. Each method runs in its own process. Batches have
16 images for 16 adapters (of four files); each is computed in turns by the bank and by the model with one of the
adapters attached, and the medians of the ratios are given. Memory is the growth of the process while a hundred adapters
are loaded after those.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from page_section import with_section

METHODS = ("adaptformer", "lora", "vpt", "houlsby", "fact", "lst", "bitfit", "norm", "partial", "peft:ia3")
BACKBONE, CLASSES, BATCH, ROUNDS, NUM_FILES, NUM_LOADED = "vit_small_patch16_224", 10, 16, 6, 4, 100
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "adapter_bank.json"
PAGE = HERE.parent / "docs" / "many-tasks.md"
BEGIN, END = "<!-- adapters:begin -->\n", "<!-- adapters:end -->\n"
COLUMNS = (
    "method", "parameters", "16 adapters", "1 adapter", "load first", "load another", "values of 100", "switch",
)  # fmt: skip


def measure(method: str) -> dict[str, Any]:
    """Load adapters of one method, each with its own values, and use them."""
    import timm
    import torch

    import petune

    torch.manual_seed(0)
    model = timm.create_model(BACKBONE, num_classes=CLASSES).eval()
    x = torch.randn(BATCH, 3, 224, 224)
    names = [str(n) for n in range(BATCH)]
    with tempfile.TemporaryDirectory() as directory:
        # from a copy, so that petune has cached nothing about this model
        single = copy.deepcopy(model)
        num_parameters = save_adapters(single, method, NUM_FILES, Path(directory))
        bank = petune.AdapterBank(model)
        times = [elapsed(lambda n=n: bank.load(n, f"{directory}/{int(n) % NUM_FILES}")) for n in names]
        with torch.inference_mode():
            ratios, difference = compare(bank, single, x, names)
        resident = resident_bytes(), bank.num_bytes
        for number in range(NUM_LOADED):
            bank.load(f"more {number}", f"{directory}/{number % NUM_FILES}")
        growth, values = resident_bytes() - resident[0], bank.num_bytes - resident[1]
    switch_s = statistics.median(elapsed(lambda n=n: bank.use(n)) for n in names)
    return {
        "method": method,
        "parameters": num_parameters,
        "mixed_ratio": ratios["mixed"],
        "single_ratio": ratios["same"],
        "first_load_s": times[0],
        "load_s": statistics.median(times[1:]),
        "values_bytes": values,
        "resident_bytes": growth,
        "switch_s": switch_s,
        "largest_difference": difference,
    }


def compare(bank: Any, single: Any, x: Any, names: list[str]) -> tuple[dict[str, float], float]:
    """Return the throughput of the bank against that of the last adapter alone, and the largest difference."""
    last = [names[-1]] * len(names)
    actions: dict[str, Callable[[], Any]] = {
        "alone": lambda: single(x), "mixed": lambda: bank(x, names), "same": lambda: bank(x, last)
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(ROUNDS + 1):
        for name, action in actions.items():
            seconds = elapsed(action)
            times[name] += [seconds] if number else []  # the first round warms up
    difference = float((bank(x, names)[-1] - single(x)[-1]).abs().max())
    pairs = {name: zip(times["alone"], times[name], strict=True) for name in ("mixed", "same")}
    return {name: statistics.median(a / b for a, b in pair) for name, pair in pairs.items()}, difference


def save_adapters(model: Any, method: str, count: int, directory: Path) -> int:
    """Save `count` different adapters; return their number of parameters, classifier included."""
    import torch

    import petune

    attachment = petune.attach(model, method)
    for number in range(count):
        with torch.no_grad():
            for parameter in attachment.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        attachment.save(directory / str(number))
    return attachment.counts.tuned + attachment.counts.head


def elapsed(action: Callable[[], Any]) -> float:
    """Return the time of an action in seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def resident_bytes() -> int:
    """Return the memory of this process, without what the C library keeps of freed memory."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(methods: Iterable[str]) -> dict[str, Any]:
    """Measure each method in its own process; keep the rows of other methods."""
    import torch

    from petune.runner.provenance import provenance

    rows = {row["method"]: row for row in json.loads(RESULTS.read_text())["rows"]} if RESULTS.exists() else {}
    results: dict[str, Any] = {}
    for method in methods:
        command = [sys.executable, __file__, "--one", method]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows[method] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(rows[method]), file=sys.stderr)
        results = {"rows": [rows[m] for m in METHODS if m in rows], "provenance": provenance(torch.device("cpu"))}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in results["rows"]]
    return "\n".join(lines) + "\n"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the text of one row."""
    return (
        row["method"],
        f"{row['parameters']:,}",
        f"{row['mixed_ratio']:.2f}",
        f"{row['single_ratio']:.2f}",
        f"{row['first_load_s'] * 1e3:,.0f} ms",
        f"{row['load_s'] * 1e3:.0f} ms",
        mebibytes(row["values_bytes"]),
        f"{row['switch_s'] * 1e3:.1f} ms",
    )


def mebibytes(size: int) -> str:
    """Format bytes as MiB."""
    return f"{size / 2**20:,.1f} MiB"


def write_page(results: dict[str, Any]) -> None:
    """Put the table into docs/many-tasks.md."""
    PAGE.write_text(with_section(PAGE, BEGIN, END, table(results)), encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*METHODS], metavar="METHOD")
    parser.add_argument("--one", metavar="METHOD", help=argparse.SUPPRESS)
    parser.add_argument("--page", action="store_true", help="rewrite the table from the results")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
    else:
        write_page(json.loads(RESULTS.read_text()) if args.page else run(args.only))


if __name__ == "__main__":
    main()
