"""Killed, or asked to stop, at random moments; resumed, everything equals the undisturbed run to the bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import FULL, TINY, Program, digests, tally, tries

VARIANTS: dict[str, tuple[str, ...]] = {
    "adaptformer": (),
    "full": ("--set=train.mixup=0.4", "--set=train.micro_batch_size=6"),
    "vpt": ("--set=train.mixup=0.4", "--set=train.micro_batch_size=6"),
    "lora": ("--set=train.mixup=0.4",),
    "linear": (),
}
CHOSEN = list(VARIANTS) if FULL else ["adaptformer", "full"]


def undisturbed(program: Program, method: str, place: Path) -> dict[str, str]:
    assert program.finish("run", f"--method={method}", *TINY, *VARIANTS[method], "--output", place) == 0
    return digests(place)


@pytest.mark.parametrize("method", CHOSEN)
def test_killed_while_training(method: str, program: Program, tmp_path: Path) -> None:
    expected = undisturbed(program, method, tmp_path / "whole")
    wanted, kills, held, runs = tries(3, 50), 0, 0, 0
    while kills < wanted:
        place = tmp_path / f"run{runs}"
        words = ("run", f"--method={method}", *TINY, *VARIANTS[method], "--output", place, "--resume")
        before = kills
        while kills < wanted and (code := program.disturb(signal.SIGKILL, *words)) != 0:
            assert code == -signal.SIGKILL
            kills += 1
        assert program.finish(*words) == 0
        steps = [r["step"] for r in map(json.loads, (place / "metrics.jsonl").read_text().splitlines()) if "step" in r]
        if digests(place) == expected and len(steps) == len(set(steps)):
            held += kills - before
        runs += 1
    tally(
        f"SIGKILL at a random moment of training, {method}",
        "resumed, equal to the bit, each step logged once",
        kills,
        held,
    )


def test_asked_to_stop(program: Program, tmp_path: Path) -> None:
    expected = undisturbed(program, "adaptformer", tmp_path / "whole")
    wanted, tried, held = tries(4, 30), 0, 0
    while tried < wanted:
        place = tmp_path / f"run{tried}"
        words = ("run", "--method=adaptformer", *TINY, "--output", place, "--resume")
        code = program.disturb(signal.SIGTERM, *words)
        assert code in (0, 75), code
        assert program.finish(*words) == 0
        held += digests(place) == expected
        tried += 1
    tally(
        "SIGTERM at a random moment, importing and evaluating included",
        "exit 75 or done; resumed, equal to the bit",
        tried,
        held,
    )


def test_compare_killed(program: Program, tmp_path: Path) -> None:
    methods = ("linear", "adaptformer", "full")

    def table(place: Path) -> list[tuple[object, ...]]:
        rows = json.loads((place / "compare.json").read_text())["rows"]
        return [(row["method"], row["status"], row["top1"], row["tuned"]) for row in rows]

    words = ("compare", *methods, *TINY, "--epochs=1", "--output")
    assert program.finish(*words, tmp_path / "whole") == 0
    expected = table(tmp_path / "whole")
    wanted, kills, held = tries(3, 20), 0, 0
    while kills < wanted:
        place = tmp_path / f"c{kills}"
        first = kills
        while kills < wanted and program.disturb(signal.SIGKILL, *words, place) != 0:
            kills += 1
        finished = {file: file.stat().st_mtime_ns for file in place.glob("*/result.json")}
        assert program.finish(*words, place) == 0
        untouched = all(file.stat().st_mtime_ns == mtime for file, mtime in finished.items())
        held += (kills - first) if table(place) == expected and untouched else 0
        if kills == first:  # it was faster than the signal
            continue
    tally("`compare` killed at a random moment", "restarted: the same table, no finished run run again", kills, held)
