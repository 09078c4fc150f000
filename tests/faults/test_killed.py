"""Killed at random moments; started again, everything equals the undisturbed run to the bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.faults.conftest import FULL, TINY, Program, digests, tally, tries
from tests.sampling import sampled

HARD = ("--set=train.mixup=0.4", "--set=train.micro_batch_size=6", "--set=train.log_every=1")
METHODS = ["adaptformer", "vpt", "lora", "full"] if FULL else ["adaptformer", "full"]


def killed_until_done(program: Program, wanted: int, words: tuple[object, ...], place: Path, **how: Any) -> int:
    """Start it again and again, each time killed at a random moment, then let it end; how many kills that took."""
    kills = 0
    while kills < wanted and (code := program.disturb(signal.SIGKILL, *words, **how)) != 0:
        assert code == -signal.SIGKILL
        kills += 1
    assert program.finish(*words, **how) == 0
    return kills


def is_as_undisturbed(place: Path, expected: dict[str, str]) -> bool:
    steps = [r["step"] for r in map(json.loads, (place / "metrics.jsonl").read_text().splitlines()) if "step" in r]
    return digests(place) == expected and len(steps) == len(set(steps)) > 5


@pytest.mark.parametrize("method", METHODS if FULL else sampled(METHODS, "adaptformer".__eq__))
def test_killed_while_training(method: str, program: Program, tmp_path: Path) -> None:
    words = ("run", f"--method={method}", *TINY, *HARD, "--set=resume=true", "--output")
    assert program.finish(*words, tmp_path / "whole") == 0
    expected = digests(tmp_path / "whole")
    wanted, kills, held, runs = tries(2, 50), 0, 0, 0
    while kills < wanted:
        place = tmp_path / f"run{runs}"
        more = killed_until_done(program, wanted - kills, (*words, place), place)
        held += more if is_as_undisturbed(place, expected) else 0
        kills, runs = kills + more, runs + 1
    what = f"SIGKILL at a random moment of training, {method}, with mixup and accumulated gradients"
    tally(what, "resumes bit-identically, each step logged once", kills, held)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of images that take a while to decode."""
    place, chance = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(4):
        (place / f"class{number}").mkdir()
        for i in range(tries(20, 30)):
            pixels = chance.integers(0, 60, (400, 400, 3), dtype=np.uint8) + np.uint8(60 * number)
            Image.fromarray(pixels).save(place / f"class{number}" / f"{i}.jpg")
    return place


@pytest.mark.exhaustive
@pytest.mark.parametrize("threads", [1, 2] if FULL else [2])
def test_killed_while_decoding_and_training(threads: int, program: Program, photos: Path, tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < threads:
        pytest.skip("a thread a core, and this machine has one")
    words = (
        "run",
        "--method=adaptformer",
        *TINY,
        *HARD,
        "--shots=12",
        f"--dataset=folder:{photos}",
        "--set=resume=true",
        "--output",
    )
    assert program.finish(*words, tmp_path / "whole", cores=1, cache=tmp_path / "cache") == 0
    expected = digests(tmp_path / "whole")
    wanted, kills, held, runs = tries(1, 50), 0, 0, 0
    while kills < wanted:
        place, cache = tmp_path / f"run{runs}", tmp_path / f"cache{runs}"  # each decodes for itself
        more = killed_until_done(program, wanted - kills, (*words, place), place, cores=threads, cache=cache)
        stumps = list(cache.rglob(".new-*"))
        held += more if is_as_undisturbed(place, expected) and not stumps else 0
        kills, runs = kills + more, runs + 1
    what = f"SIGKILL at a random moment of decoding a folder and training, {threads} decoding thread(s)"
    tally(what, "resumes bit-identically; no partial file in the cache", kills, held)


@pytest.mark.exhaustive
def test_compare_killed(program: Program, tmp_path: Path) -> None:
    methods = ("linear", "adaptformer", "full")

    def table(place: Path) -> list[tuple[object, ...]]:
        rows = json.loads((place / "compare.json").read_text())["rows"]
        return [(row["method"], row["status"], row["metrics"], row["tuned"]) for row in rows]

    words = ("compare", *methods, *TINY, "--epochs=1", "--output")
    assert program.finish(*words, tmp_path / "whole") == 0
    expected = table(tmp_path / "whole")
    wanted, kills, held = tries(1, 20), 0, 0
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
    tally(
        "`compare` killed at a random moment",
        "after a restart, the same table; finished runs are not repeated",
        kills,
        held,
    )
