"""The installed program is asked to stop at 30 moments, from its first imports to its last breath."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.conftest import FULL, TINY, WAIT_S, Program, digests, tally
from tests.sampling import sampled

PETUNE = Path(sys.executable).with_name("petune")
WORDS = (
    "run", "--method=adaptformer", *TINY, "--epochs=2",
    "--set=train.log_every=1", "--set=train.eval_batch_size=4", "--set=train.micro_batch_size=6",
)  # fmt: skip
STEPS = 200 // 16  # an epoch
WITHIN_S = 5.0


@dataclass
class Started:
    """The program in a process of its own, writing to `place`."""

    place: Path
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        words = [str(PETUNE), *WORDS, "--output", str(self.place), "--set=resume=true"]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.wait_for(self.has_handler)
        self.ready_s = time.monotonic() - self.begun

    def wait_for(self, reached: Callable[[], bool]) -> None:
        while self.process.poll() is None and not reached():
            time.sleep(0.002)

    def has_handler(self) -> bool:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)

    def rows(self, key: str) -> list[dict[str, float]]:
        """Complete lines of metrics.jsonl that have `key`."""
        file = self.place / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [row for row in map(json.loads, lines) if key in row]

    def validated(self) -> int:
        return len(self.rows("val_top1"))

    def there(self, pattern: str) -> bool:
        return any(self.place.glob(pattern))

    def stop(self) -> tuple[int, float, str]:
        """Ask; its exit code, how long it took (less the time others had the cores or the disk), its last line."""
        asked = last = time.monotonic()
        before, waits, disk_s = sum(self.waits().values()), self.waits(), 0.0
        self.process.terminate()
        while os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            now = time.monotonic()
            waits |= self.waits()
            disk_s += now - last if self.states() & {"D"} else 0.0
            last = now
            time.sleep(0.002)
        whole_s, core_s = time.monotonic() - asked, sum(waits.values()) - before
        print(f"{whole_s:.2f} s, of it {core_s:.2f} s waiting for a core and {disk_s:.2f} s for the disk")
        _, err = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, whole_s - core_s - disk_s, err.strip().rpartition("\n")[2]

    def read(self, name: str) -> dict[int, str]:
        """A file of /proc for the process and for those it waits for (git tells it the commit)."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = {}
        for pid in (self.process.pid, *map(int, children)):
            with contextlib.suppress(OSError):  # it has just ended
                found[pid] = Path(f"/proc/{pid}/{name}").read_text()
        return found

    def waits(self) -> dict[int, float]:
        return {pid: int(text.split()[1]) / 1e9 for pid, text in self.read("schedstat").items()}

    def states(self) -> set[str]:
        return {text.rpartition(")")[2].split()[0] for text in self.read("stat").values()}


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: what it yields, how long it imports and prepares, its steps an epoch."""

    digests: dict[str, str]
    import_s: float
    prepare_s: float
    steps: int


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, program: Program) -> Whole:
    if not (PETUNE.exists() and os.path.isdir("/proc/self")):
        pytest.skip("needs the installed program, and /proc to see when its handler is in place")
    place = tmp_path_factory.mktemp("whole")
    assert program.finish(*WORDS, "--output", place / "whole") == 0
    expected = digests(place / "whole")
    if not FULL:
        return Whole(expected, 0.5, 0.5, STEPS)
    run = Started(place / "run")
    marks = []
    for pattern in ("config.yaml", "metrics.jsonl"):
        run.wait_for(lambda pattern=pattern: run.there(pattern))  # type: ignore[misc]
        marks.append(time.monotonic() - run.begun)
    _, err = run.process.communicate(timeout=WAIT_S)
    assert run.process.returncode == 0, err
    assert digests(run.place) == expected
    return Whole(expected, marks[0] - run.ready_s, marks[1] - marks[0], STEPS)


def importing(run: Started, whole: Whole, chance: random.Random) -> None:
    time.sleep(chance.uniform(0, whole.import_s))


def preparing(run: Started, whole: Whole, chance: random.Random) -> None:
    run.wait_for(lambda: run.there("config.yaml"))
    time.sleep(chance.uniform(0, whole.prepare_s))


def training(run: Started, whole: Whole, chance: random.Random) -> None:
    step = chance.randrange(1, 2 * whole.steps)
    run.wait_for(lambda: len(run.rows("lr")) >= step)


def validating(run: Started, whole: Whole, chance: random.Random) -> None:
    epoch = chance.choice((1, 2))
    run.wait_for(lambda: len(run.rows("lr")) >= epoch * whole.steps)
    time.sleep(chance.uniform(0, 0.05))


def saving_a_checkpoint(run: Started, whole: Whole, chance: random.Random) -> None:
    epoch = chance.choice((1, 2))
    run.wait_for(lambda: run.validated() >= epoch and run.there("checkpoints/.step-*"))


def measuring_on_test(run: Started, whole: Whole, chance: random.Random) -> None:
    run.wait_for(lambda: run.validated() == 2 and run.there(f"checkpoints/step-{2 * whole.steps:09}"))
    time.sleep(chance.uniform(0, 0.2))


def saving_the_adapter(run: Started, whole: Whole, chance: random.Random) -> None:
    run.wait_for(lambda: run.there(".adapter-*") or run.there("adapter"))


def leaving(run: Started, whole: Whole, chance: random.Random) -> None:
    run.wait_for(lambda: run.there("result.json"))
    time.sleep(chance.uniform(0, 0.2))


MOMENTS = {importing: 6, preparing: 4, training: 5, validating: 4, saving_a_checkpoint: 4, measuring_on_test: 3}
MOMENTS |= {saving_the_adapter: 2, leaving: 2}
SMALL = (importing, validating)


@pytest.mark.parametrize(
    "moment", MOMENTS if FULL else sampled(SMALL, lambda moment: moment is importing), ids=lambda m: m.__name__
)
def test_asked_to_stop(
    moment: Callable[[Started, Whole, random.Random], None], whole: Whole, program: Program, tmp_path: Path
) -> None:
    chance, tried, held = random.Random(moment.__name__), MOMENTS[moment] if FULL else 1, 0
    slowest = ready = 0.0
    for number in range(tried):
        run = Started(tmp_path / f"run{number}")
        moment(run, whole, chance)
        code, seconds, said = run.stop()
        assert code in (0, 75), (code, said)
        assert code == 0 or "stopped by SIGTERM" in said or "--resume" in said, said
        assert program.finish(*WORDS, "--output", run.place, "--set=resume=true") == 0
        same = digests(run.place) == whole.digests
        held += same and seconds < WITHIN_S
        print(f"moment {number}: exit {code} after {seconds:.2f} s, resumed {'the same' if same else 'different'}")
        slowest, ready = max(slowest, seconds), max(ready, run.ready_s)
    note = f"exited within {slowest:.1f} s" + (f", handler in place after {ready:.2f} s" if moment is importing else "")
    what = f"SIGTERM while {moment.__name__.replace('_', ' ')}, the installed program"
    tally(what, "exit 75 or finished within 5 s; resumes bit-identically", tried, held, note)
