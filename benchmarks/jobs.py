"""Measure how many runs finish in an hour: several of few threads at a time, or one after the other with all threads.

    python benchmarks/jobs.py                       # 8 runs of vit_nano's AdaptFormer on digits, two rounds
    python benchmarks/jobs.py --runs 4 --rounds 1

A round does `petune compare` with and without `--jobs`, in turns; the times count from the start of the command, so
they include what it imports. Expected: two jobs of one thread finish 1.3 times as many runs as one run of two threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time


def main() -> None:
    """Measure, and print each round and the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    ratios = []
    for _ in range(options.rounds):
        alone = seconds(options.runs, options.epochs)
        together = seconds(options.runs, options.epochs, "--jobs", str(options.jobs))
        ratios.append(alone / together)
        print(
            json.dumps({"alone_s": round(alone, 1), "jobs_s": round(together, 1), "load": os.getloadavg()}), flush=True
        )
    ratios.sort()
    print(
        f"{options.jobs} jobs finish {statistics.median(ratios):.2f} times as many runs in an hour "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def seconds(runs: int, epochs: int, *flags: str) -> float:
    """Return how long a comparison of one method with some seeds takes."""
    with tempfile.TemporaryDirectory() as directory:
        seeds = ",".join(map(str, range(runs)))
        words = ["compare", "adaptformer", "--backbone", "vit_nano", "--dataset", "digits", "--epochs", str(epochs)]
        words += ["--seeds", seeds, "--device", "cpu", "--output", f"{directory}/compare", *flags]
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "petune", *words], check=True, capture_output=True)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
