"""Measure petune.AdapterBank on ViT-S/16 at 224: batches of several adapters, loading, memory.

    python benchmarks/adapter_bank.py             # writes results/adapter_bank.json and docs/many-tasks.md
    python benchmarks/adapter_bank.py --page      # rewrites the table from the results
    python benchmarks/adapter_bank.py --only vpt  # measures one method and keeps the rows of the others

The weights are random, since neither time nor memory depends on them. Each method runs in its own process. Batches have
16 images for 16 adapters (of four files); each is computed in turns by the bank and by the model with one of the
adapters attached, and the medians of the ratios are given. Then a thousand adapters (of the same files) are loaded in
two fresh processes, without a limit and with one: the growth of the process, and the times of a hit and of a miss.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from page_section import with_section
from result_files import write_json

from petune.base.files import replace_file

METHODS = ("adaptformer", "vpt", "lora", "houlsby", "bitfit", "norm", "partial", "peft:ia3")
METHODS_OF_MEMORY = ("adaptformer", "lora")
BACKBONE, CLASSES, BATCH, ROUNDS, NUM_FILES = "vit_small_patch16_224", 10, 16, 5, 4
NUM_LOADED, MAX_MEMORY, NUM_USED = 1000, 100 * 2**20, 50
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "adapter_bank.json"
PAGE = HERE.parent / "docs" / "many-tasks.md"
BEGIN, END = "<!-- adapters:begin -->\n", "<!-- adapters:end -->\n"
COLUMNS = (
    "method", "parameters", "16 adapters", "1 adapter", "load first", "load another", "switch",
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
    switch_s = statistics.median(elapsed(lambda n=n: bank.use(n)) for n in names)
    return {
        "method": method,
        "parameters": num_parameters,
        "mixed_ratio": ratios["mixed"],
        "single_ratio": ratios["same"],
        "first_load_s": times[0],
        "load_s": statistics.median(times[1:]),
        "switch_s": switch_s,
        "largest_difference": difference,
    }


def measure_memory(method: str, max_memory: int | None) -> dict[str, Any]:
    """Load a thousand adapters, and use some of them at random."""
    import timm
    import torch

    import petune

    torch.manual_seed(0)
    model = timm.create_model(BACKBONE, num_classes=CLASSES).eval()
    x = torch.randn(BATCH, 3, 224, 224)
    with tempfile.TemporaryDirectory() as directory:
        save_adapters(copy.deepcopy(model), method, NUM_FILES, Path(directory))
        bank = petune.AdapterBank(model, max_memory=max_memory)
        bank.load("first", f"{directory}/0")
        with torch.inference_mode():
            bank(x, ["first", None] * (BATCH // 2))
        before = resident_bytes(), bank.num_bytes
        for number in range(NUM_LOADED):
            bank.load(str(number), f"{directory}/{number % NUM_FILES}")
        values, growth = bank.num_bytes - before[1], resident_bytes() - before[0]
        names = random.Random(0).sample([str(n) for n in range(NUM_LOADED)], NUM_USED)
        use_s = statistics.median(elapsed(lambda n=n: bank.use(n)) for n in names)
    return {"method": method, "limit": max_memory, "values_bytes": values, "growth_bytes": growth, "use_s": use_s}


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
    """Measure each method in its own process; keep the rows of other methods, each with its own provenance."""
    import torch

    from petune.runner.provenance import provenance

    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    shared = {"provenance": results["provenance"]} if "provenance" in results else {}  # of an earlier version
    rows = {row["method"]: shared | row for row in results["rows"]}
    memory = {(row["method"], row["limit"]): shared | row for row in results.get("memory", [])}
    origin = {"provenance": provenance(torch.device("cpu"))}
    for method in methods:
        rows[method] = in_own_process("--one", method) | origin
        for limit in (None, MAX_MEMORY) if method in METHODS_OF_MEMORY else ():
            memory[method, limit] = in_own_process("--memory", method, str(limit or 0)) | origin
        results = {"rows": [rows[m] for m in METHODS if m in rows], "memory": [*memory.values()]}
        write_json(RESULTS, results)
    return results


def in_own_process(*arguments: str) -> dict[str, Any]:
    """Return what this file measures in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(row), file=sys.stderr)
    return row


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in results["rows"]]
    memory = [memory_text(row) for row in results.get("memory", [])]
    return "\n".join([*lines, *([""] if memory else []), *memory]) + "\n"


def memory_text(row: dict[str, Any]) -> str:
    """Return what was measured with a thousand adapters, as an item of a list."""
    values, growth = mebibytes(row["values_bytes"]), mebibytes(row["growth_bytes"])
    limit = f"`max_memory` of {mebibytes(row['limit'])}" if row["limit"] else "all in memory"
    use = "a miss, which reads one file," if row["limit"] else "a hit"
    return (
        f"- {NUM_LOADED:,} adapters of {row['method']}, {limit}: {values} of values, the process grew by {growth}; "
        f"{use} takes {row['use_s'] * 1e3:.1f} ms"
    )


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the text of one row."""
    return (
        row["method"],
        f"{row['parameters']:,}",
        f"{row['mixed_ratio']:.2f}",
        f"{row['single_ratio']:.2f}",
        f"{row['first_load_s'] * 1e3:,.0f} ms",
        f"{row['load_s'] * 1e3:.0f} ms",
        f"{row['switch_s'] * 1e3:.1f} ms",
    )


def mebibytes(size: int) -> str:
    """Format bytes as MiB."""
    return f"{size / 2**20:,.1f} MiB"


def write_page(results: dict[str, Any]) -> None:
    """Put the table into docs/many-tasks.md."""
    replace_file(PAGE, with_section(PAGE, BEGIN, END, table(results)).encode())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*METHODS], metavar="METHOD")
    parser.add_argument("--one", metavar="METHOD", help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, metavar=("METHOD", "LIMIT"), help=argparse.SUPPRESS)
    parser.add_argument("--page", action="store_true", help="rewrite the table from the results")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
    elif args.memory:
        print(json.dumps(measure_memory(args.memory[0], int(args.memory[1]) or None)))
    else:
        write_page(json.loads(RESULTS.read_text()) if args.page else run(args.only))


if __name__ == "__main__":
    main()
