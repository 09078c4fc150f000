"""Measure petune on one GPU in at most ten minutes, compared with PEFT's LoRA and a plain loop over timm's model.

    python benchmarks/gpu.py                               # ten minutes; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --minutes 5 --output DIR      # what matters most, into DIR/gpu.json
    python benchmarks/gpu.py --smoke                       # a toy model on the CPU, to see that it runs

Rows are measured in order of their importance, and each is written as soon as it is measured. A row that is not
expected to fit into the time is left out, and named. A step and the one that it is compared with run in turns in one
process, and a ratio is the median over rounds. FLOPs are those of torch's counter; MFU is their rate relative to the
vendor's peak for dense bfloat16. `python benchmarks/tables.py` shows the result in docs/speed.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from card import describe_card
from gpu_page import RESULT, markdown
from gpu_rows import StepBench, base_precision_field, measure_bank, measure_int8
from gpu_steps import GPU_SIZES, STEPS, StepKey
from result_files import need_same_size, write_json

from petune.base.files import replace_file
from petune.runner.provenance import provenance
from petune.training.precision import choose_device

SMOKE_OUTPUT = Path(__file__).resolve().parents[1] / "runs" / "gpu_smoke"
BANK_METHODS = ("adaptformer", "lora", "vpt")
EXPECTED_S = {"step": 20.0, "compiled step": 75.0, "bank": 25.0, "int8": 60.0}
"""Time of the first row of a kind, in seconds."""


@dataclass(frozen=True)
class Row:
    """A row to measure.

    Attributes:
        kind: A key of `EXPECTED_S`.
        size: A key of `GPU_SIZES`.
        title: Names the row.
        measure: Returns its numbers.
    """

    kind: str
    size: str
    title: str
    measure: Callable[[], dict[str, Any]]


def all_rows(bench: StepBench, sizes: list[str], compile_too: bool, smoke: bool) -> list[Row]:
    """Return the rows, the most important ones first."""
    groups: list[Row] = []
    for size in sizes:
        groups += [_step_row(bench, StepKey(size, name)) for name in STEPS]
        if size == sizes[0]:
            groups += [_bank_row(bench, size, m, n, k) for n, k in _batches(smoke) for m in BANK_METHODS]
        if compile_too:
            groups += [_step_row(bench, StepKey(size, name, compiled=True)) for name in STEPS]
        images = 2 if smoke else None
        int8 = lambda s=size, n=images: measure_int8(GPU_SIZES[s], bench.device, n)  # noqa: E731
        groups.append(Row("int8", size, "petune adaptformer, int8 backbone", int8))
    late = {"compiled step": 1, "int8": 0}  # of the larger model, after all other rows
    return sorted(groups, key=lambda row: (row.size != sizes[0]) + late.get(row.kind, 0) * (row.size != sizes[0]))


def _batches(smoke: bool) -> list[tuple[int, int]]:
    """Return images and adapters of mixed batches."""
    return [(4, 2)] if smoke else [(16, 16), (128, 16)]


def _step_row(bench: StepBench, key: StepKey) -> Row:
    return Row("compiled step" if key.compiled else "step", key.size, key.name, lambda: bench.measure(key))


def _bank_row(bench: StepBench, size: str, method: str, images: int, adapters: int) -> Row:
    title = f"bank, {method}, {images} images, {adapters} adapters"
    return Row("bank", size, title, lambda: measure_bank(bench, GPU_SIZES[size], method, images, adapters))


def measure_all(rows: list[Row], bench: StepBench, ends_at: float, result: dict[str, Any], output: Path) -> None:
    """Measure row by row, and write the result after each."""
    slowest: dict[tuple[str, str], float] = {}
    for row in rows:
        entry: dict[str, Any] = {"kind": row.kind, "size": row.size, "title": row.title}
        left = ends_at - time.perf_counter()
        if row.size not in result["products_tflops"]:
            result["products_tflops"][row.size] = bench.product_tflops(GPU_SIZES[row.size])
        if row.kind == "int8" and base_precision_field() is None:
            entry |= {"status": "left out", "reason": "this petune has no --base-precision"}
        elif expected_s(row, slowest) > left:
            entry |= {"status": "left out", "reason": f"{left:.0f} s were left"}
        else:
            entry |= _measured(row, bench)
            slowest[row.kind, row.size] = max(entry["took_s"], slowest.get((row.kind, row.size), 0.0))
        result["rows"].append(entry)
        write(result, output, ends_at)
        print(f"{row.size}, {row.kind}, {row.title}: {_brief(entry)}", flush=True)


def expected_s(row: Row, slowest: Mapping[tuple[str, str], float]) -> float:
    """Return the time of the slowest row of this kind so far, or twice that of another size."""
    other = [seconds for (kind, _), seconds in slowest.items() if kind == row.kind]
    return slowest.get((row.kind, row.size), 2 * max(other) if other else EXPECTED_S[row.kind])


def _measured(row: Row, bench: StepBench) -> dict[str, Any]:
    start = time.perf_counter()
    if row.kind not in {"step", "compiled step"}:
        bench.release_all()
    try:
        entry = {"status": "measured", **row.measure()}
    except Exception as error:  # whatever fails on a new card, the other rows are worth having
        bench.release_all()
        entry = {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    bench.free()
    return entry | {"took_s": time.perf_counter() - start}


def write(result: dict[str, Any], output: Path, ends_at: float) -> None:
    """Write gpu.json and gpu.md."""
    result["seconds_left"] = ends_at - time.perf_counter()
    write_json(output / RESULT.name, result)
    replace_file(output / "gpu.md", (markdown(result) + "\n").encode())


def _brief(entry: dict[str, Any]) -> str:
    if entry["status"] != "measured":
        return f"{entry['status']}: {entry['reason']}"
    return f"{entry['images_per_s']:,.0f} images/s, took {entry['took_s']:.0f} s"


def main() -> None:
    """Run the command line."""
    start = time.perf_counter()
    args = _arguments()
    device = choose_device("cpu" if args.smoke else "auto")
    if device.type != "cuda" and not args.smoke:
        raise SystemExit("there is no NVIDIA GPU here. Use --smoke to see that the script runs")
    need_same_size(args.output / RESULT.name, args.smoke)
    bench = StepBench(device, 0.0 if args.smoke else args.seconds)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "card": describe_card(device),
        "provenance": provenance(device),
        "smoke": args.smoke,
        "minutes": args.minutes,
        "products_tflops": {},
        "rows": [],
    }
    result["provenance"]["git"] = result["provenance"]["git"] or {"commit": args.commit, "dirty": False}
    rows = all_rows(bench, ["toy"] if args.smoke else args.sizes, args.compile, args.smoke)
    try:
        measure_all(rows, bench, start + 60 * args.minutes, result, args.output)
    finally:
        bench.release_all()
    print(markdown(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.5, help="no row begins that is not expected to end by then")
    parser.add_argument("--seconds", type=float, default=6, help="for the rounds of a row; at least 3 rounds")
    parser.add_argument("--sizes", nargs="+", choices=GPU_SIZES, default=["ViT-B", "ViT-L"])
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results, or runs/gpu_smoke with --smoke")
    parser.add_argument("--commit", help="of this code, where git cannot say")
    parser.add_argument("--smoke", action="store_true", help="a toy model on the CPU")
    args = parser.parse_args()
    args.output = args.output or (SMOKE_OUTPUT if args.smoke else RESULT.parent)
    return args


if __name__ == "__main__":
    main()
