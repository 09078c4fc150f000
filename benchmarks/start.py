"""Measure the time from a command to its first optimizer step, relative to what importing its libraries takes.

    python benchmarks/start.py                                # AdaptFormer and PEFT's LoRA on digits, five rounds
    python benchmarks/start.py --methods adaptformer --rounds 1

A round starts `petune run` and, for comparison, a Python that imports torch, timm and what the method needs; both
times count from the start of the process. Expected: 1.2 times. It names the packages that were loaded by the first
step, with the time that Python spends in them (`-X importtime`, in a run of its own).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter

NEEDED = {"adaptformer": "torch, timm", "peft:lora": "torch, timm, peft"}
"""What a method cannot do without, as an import statement has it."""
UNTIL_FIRST_STEP = """
import os, sys, time
from petune.cli.main import main
from petune.cli.progress import ProgressDisplay
def stop(*_):
    print("FIRST STEP", time.time(), flush=True)
    os._exit(0)
def take_step(step):
    return lambda *args: stop(step(*args))
def watch(self, event):
    import petune.training.loop as loop  # imported by the first event; a trial step of the optimizer comes before
    loop.Trainer.step = take_step(loop.Trainer.step)
    ProgressDisplay.__call__ = lambda *_: None
ProgressDisplay.__call__ = watch
main(sys.argv[1:])
"""
SHOWN = 12


def main() -> None:
    """Measure, and print the ratios and what was loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(NEEDED), choices=list(NEEDED))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps({"load": os.getloadavg()}))
    for method in options.methods:
        first_step(method), imports(NEEDED[method])  # fills the disk cache
        rounds = [(first_step(method), imports(NEEDED[method])) for _ in range(options.rounds)]
        ratios = sorted(step / base for step, base in rounds)
        step, base = (statistics.median(times) for times in zip(*rounds, strict=True))
        print(
            f"{method}: first step after {step:.2f} s, importing {NEEDED[method]} takes {base:.2f} s: "
            f"{statistics.median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
        print("  loaded:", ", ".join(f"{name} {ms:.0f} ms" for name, ms in loaded(method)))


def first_step(method: str) -> float:
    """Return the time from the start of `petune run` to the end of its first step, in seconds."""
    start = time.time()
    return float(re.findall(r"FIRST STEP (\S+)", run(method).stdout)[0]) - start


def imports(needed: str) -> float:
    """Return the time from the start of a Python until it has imported packages, in seconds."""
    code = f"import time, {needed}; print(time.time())"
    start = time.time()
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout) - start


def loaded(method: str) -> list[tuple[str, float]]:
    """Return the packages that take most of the time of imports until the first step, in ms, without those below."""
    times: Counter[str] = Counter()
    for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", run(method, "-X", "importtime").stderr):
        times[name.partition(".")[0]] += int(own)
    return [(name, us / 1e3) for name, us in times.most_common(SHOWN)]


def run(method: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a command until its first step."""
    with tempfile.TemporaryDirectory() as directory:
        words = ["run", "--method", method, "--backbone", "vit_nano", "--dataset", "digits", "--epochs", "1"]
        words += ["--output", f"{directory}/run"]
        return subprocess.run(
            [sys.executable, *options, "-c", UNTIL_FIRST_STEP, *words], check=True, capture_output=True, text=True
        )


if __name__ == "__main__":
    main()
