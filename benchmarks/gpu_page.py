"""Show what benchmarks/gpu.py measured, for docs/speed.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from card import commit_of
from result_files import read_measured

RESULT = Path(__file__).resolve().parent / "results" / "gpu.json"
UNKNOWN = "–"
NOT_RUN = (
    "`python benchmarks/gpu.py` takes ten minutes on one card: steps of ViT-B and ViT-L in bfloat16, compiled and not, "
    "in turns with PEFT's LoRA and a plain loop over timm's model; MFU, peak memory, batches of mixed adapters, an "
    "int8 backbone. **It has not been run yet**, because there was no GPU; only at toy size on a CPU."
)


def section(file: Path = RESULT) -> str:
    """Return the section of docs/speed.md."""
    return "### On a GPU\n\n" + (markdown(read_measured(file)) if file.exists() else NOT_RUN) + "\n"


def markdown(result: Mapping[str, Any]) -> str:
    """Return card and tables of a result, also of one that was stopped early."""
    card, versions = result["card"], result["provenance"]["versions"]
    peak = card["peak_tflops"]
    products = ", ".join(f"{size} {rate:,.3g} TFLOP/s" for size, rate in result["products_tflops"].items())
    parts = [
        f"`{result['command']}` on {card['name']}, driver {card['driver']}, CUDA {card['cuda']}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f", {commit_of(result)}. The largest matrix product of the model runs at: {products}. MFU is relative to "
        + (f"{peak:g} TFLOP/s, the datasheet's peak for dense bfloat16." if peak else "a peak that is not known here.")
        + " Medians over rounds, quartiles in brackets.",
        _table(
            ("model", "step", "ms", "images/s", "time relative to", "TFLOP/s", "MFU", "memory"),
            [_step_cells(row, peak) for row in result["rows"] if _is_measured(row, "step", "compiled step")],
        ),
        _table(
            ("model", "mixed batch", "ms", "images/s", "throughput relative to one attached adapter", "load one more"),
            [_bank_cells(row) for row in result["rows"] if _is_measured(row, "bank")],
        ),
        _table(
            ("model", "int8", "images/s", "time relative to bfloat16", "memory", "relative to bfloat16"),
            [_int8_cells(row) for row in result["rows"] if _is_measured(row, "int8")],
        ),
        _left_out(result),
    ]
    return "\n\n".join(part for part in parts if part)


def _is_measured(row: Mapping[str, Any], *kinds: str) -> bool:
    return row["kind"] in kinds and row["status"] == "measured"


def _step_cells(row: Mapping[str, Any], peak: float | None) -> tuple[str, ...]:
    compiled = ", compiled" * (row["kind"] == "compiled step")
    rate = row["tflops"]
    return (
        row["size"],
        row["title"] + compiled,
        _spread(row["step_s"], 1e3, 1),
        f"{row['images_per_s']:,.0f}",
        f"{row['against']}: {_spread(row['time_relative_to_it'], 1, 2)}",
        UNKNOWN if rate is None else f"{rate:,.3g}",
        UNKNOWN if rate is None or peak is None else f"{100 * rate / peak:.1f} %",
        _gigabytes(row["peak_bytes"]),
    )


def _bank_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["size"],
        row["title"].removeprefix("bank, "),
        _spread(row["batch_s"], 1e3, 1),
        f"{row['images_per_s']:,.0f}",
        _spread(row["throughput_relative_to_one"], 1, 2),
        f"{1e3 * row['load_s']:.0f} ms",
    )


def _int8_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["size"],
        row["title"],
        f"{row['images_per_s']:,.0f}",
        f"{row['time_relative_to_bf16']:.2f}",
        _gigabytes(row["peak_bytes"]),
        f"{row['memory_relative_to_bf16']:.2f}",
    )


def _left_out(result: Mapping[str, Any]) -> str:
    """Name the rows that were not measured, and why."""
    reasons: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["status"] != "measured":
            title = f"{row['size']}, {row['title']}{', compiled' * (row['kind'] == 'compiled step')}"
            reasons.setdefault(f"{row['status']} ({row['reason']})", []).append(title)
    return "\n".join(f"- {reason}: {'; '.join(titles)}." for reason, titles in reasons.items())


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---", "---", *["---:"] * (len(columns) - 2)), *rows] if rows else []
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(spread: Mapping[str, float], factor: float, digits: int) -> str:
    low, middle, high = (f"{factor * spread[key]:,.{digits}f}" for key in ("low", "median", "high"))
    return f"{middle} ({low} to {high})"


def _gigabytes(size: int | None) -> str:
    return UNKNOWN if size is None else f"{size / 1e9:.2f} GB"
