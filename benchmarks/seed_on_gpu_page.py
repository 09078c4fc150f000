"""Show the Paddle study as one GPU ran it in a quarter of an hour, for docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from card import commit_of
from result_files import read_measured

RESULT = Path(__file__).resolve().parent / "results" / "seed_on_gpu.json"
SUITE = "paddle_study"
TITLES = {"pretrain": "pretraining", "frozen": "frozen", "not_frozen": "not frozen"}
INTRODUCTION = (
    "`python benchmarks/seed_on_gpu.py` fits this study into the 13 minutes that a GPU is lent for: one minute of "
    "warm-up decides how many epochs fit."
)


def section(file: Path = RESULT) -> list[str]:
    """Return the lines of the section."""
    lines = ["### In a quarter of an hour on one GPU", ""]
    if not file.exists():
        return [*lines, f"{INTRODUCTION} **It has not been run yet**, because there was no GPU.", ""]
    return [*lines, INTRODUCTION, "", *measured(read_measured(file)), ""]


def measured(result: Mapping[str, Any]) -> list[str]:
    """Return card, plan and table of a result, also of one that was stopped early."""
    card, versions = result["card"], result["provenance"]["versions"]
    lines = [
        f"{card['name']}, driver {card['driver']}, torch {versions['torch']}, petune {versions['petune']}, "
        f"{commit_of(result)}; at most {result['limit_minutes']:g} minutes.{plan_text(result['plan'])}",
        "",
        "| stage | dataset | epochs | top-1 | top-5 | the study | images/s | training |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    studied = {what: expected["top1"] for what, expected in result["expected"].items()}
    for stage, record in result["stages"].items():
        goal = None if stage == "pretrain" else studied.get(record["method"])
        lines.append("| " + " | ".join(row(stage, record, goal)) + " |")
    return lines


def plan_text(plan: Mapping[str, Any] | None) -> str:
    """Return what the warm-up decided, as a sentence."""
    if plan is None:
        return ""
    rate = plan["rate"]
    how = "compiled" if rate["compiled"] else "not compiled"
    return f" In the warm-up an epoch took {rate['epoch_s']:.1f} s ({how}), with {plan['seconds_left']:.0f} s left."


def row(stage: str, record: Mapping[str, Any], goal: float | None) -> tuple[str, ...]:
    """Return the cells of a stage."""
    result, unknown = record["result"], "–"
    return (
        TITLES[stage],
        record["dataset"],
        f"{len(record['curve'])} of {record['wanted']}",
        f"{result['metrics']['top1']:.2f}" if result else unknown,
        f"{result['metrics']['top5']:.2f}" if result else unknown,
        unknown if goal is None else f"{goal:g}",
        f"{result['images_per_s']:,.0f}" if result else unknown,
        f"{result['time_s']:.0f} s" if result else unknown,
    )
