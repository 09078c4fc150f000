"""Faults on purpose. `make test` tries a few of each kind; `make faults` tries them all and writes docs/reliability.md.

Runs are real processes: the program's `main` in a child of a fork server that has torch and timm imported already.
Signals while it imports are tried on the installed program itself (test_asked_to_stop.py).
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from petune.__main__ import main
from tests.faults.page import Row, write_page

FULL = os.environ.get("PETUNE_FAULTS") == "full"
TINY = (
    "--backbone=vit_nano", "--weights=none", "--set=backbone_options.depth=2", "--set=backbone_options.embed_dim=48",
    "--dataset=digits", "--shots=20", "--epochs=3", "--batch-size=16", "--device=cpu", "--precision=fp32",
    "--set=train.eval_batch_size=64",
)  # fmt: skip
WAIT_S = 600  # a machine may be busy
TALLY: list[Row] = []
RAN: list[str] = []


def tally(fault: str, expected: str, tried: int, held: int, note: str = "") -> None:
    """Record what was tried and what held, and fail unless all of it did."""
    TALLY.append(Row(fault, expected, f"{held} of {tried}" + (f"; {note}" if note else ""), RAN[-1]))
    assert held == tried, f"{fault}: {held} of {tried}"


def tries(few: int, many: int) -> int:
    """How often to try: few in `make test`, many in `make faults`."""
    return many if FULL else few


@dataclass
class Program:
    """Starts `petune WORDS` in children. `seconds` is how long an undisturbed tiny run takes here."""

    context: multiprocessing.context.ForkServerContext
    seconds: float = 0.0
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def start(self, *words: object, cores: int = 0, cache: Path | None = None) -> BaseProcess:
        """Start it, on so many of the cores (0: all) and with a cache directory of its own."""
        process = self.context.Process(target=child, args=([str(word) for word in words], cores, cache))
        process.start()
        return process

    def finish(self, *words: object, **how: Any) -> int | None:
        process = self.start(*words, **how)
        process.join(WAIT_S)
        return process.exitcode

    def disturb(self, number: int, *words: object, **how: Any) -> int | None:
        """Start it and send a signal at a random moment; its exit code."""
        process = self.start(*words, **how)
        time.sleep(self.chance.uniform(0.02, self.seconds))
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)
        process.join(WAIT_S)
        return process.exitcode


def child(words: list[str], cores: int, cache: Path | None) -> None:
    """The program in a child of the fork server."""
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    if cache is not None:
        os.environ["PETUNE_CACHE"] = str(cache)
    main(words)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program, with its libraries imported and the digits decoded."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["petune.runner.run", "petune.runner.compare", "petune.cli.main", "timm", "sklearn.datasets", "torchmetrics"]
    )
    started = Program(context)
    place = tmp_path_factory.mktemp("first")
    for name in "ab":
        begun = time.monotonic()
        assert started.finish("run", "--method=linear", *TINY, "--output", place / name) == 0
        started.seconds = time.monotonic() - begun
    return started


@pytest.fixture(autouse=True)
def _running(request: pytest.FixtureRequest) -> None:
    RAN.append(f"{request.path.name}::{request.node.name}")


@pytest.fixture(scope="session", autouse=True)
def _page() -> Iterator[None]:
    """After a session of `make faults`, or of a part of it, the table."""
    TALLY.clear()
    yield
    if FULL:
        write_page(TALLY, RAN)


def digests(place: Path) -> dict[str, str]:
    """SHA-256 of all that a run yields, but for times: adapter, metrics, the newest checkpoint's files."""
    newest = max((place / "checkpoints").glob("step-*"))
    files = [place / "adapter" / "adapter_model.safetensors", place / "metrics.jsonl"]
    files += [newest / f"{name}.safetensors" for name in ("model", "best", "optimizer")]
    return {str(file.relative_to(place)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
