"""Measure what a choice of blocks saves: AdaptFormer in some blocks of a model against all of them.

    python benchmarks/blocks.py                     # ViT-B at 224, about ten minutes on an idle machine
    python benchmarks/blocks.py --size vit_nano     # a small model, in a minute
    python benchmarks/blocks.py --choices last:1 last:6 every:3
    python benchmarks/blocks.py --quick             # a toy model, to see that it runs

The steps of all choices run in turns in one process; a ratio is taken within a round and shown as the median over
rounds with its range. That of CPU time depends less on what else the machine does. They are petune's own steps, as
`petune run` does them with augmentation. Peak memory is that of a process of its own for each choice, after two steps,
with and without what it holds before the model is built.
Expected on an idle machine, ViT-B at 224, blocks=last:3: at most 0.50 of the step time and 0.60 of the memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from result_files import speed_folder, write_json
from speed_peers import CPU, SIZES, petune_step

from petune.base.files import replace_file
from petune.runner.provenance import PeakMemory, provenance

ALL = "all"


def main() -> None:
    options = _options()
    if options.memory_of:
        print(json.dumps(_measure_memory(options.size, options.memory_of)))
        return
    size = SIZES[options.size]
    choices = [ALL, *options.choices]
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/blocks.py", *sys.argv[1:]]),
        "provenance": provenance(CPU),
        "load": list(os.getloadavg()),
        "size": size.name,
        **_time_steps(options.size, choices, options.rounds),
        "memory": {choice: _memory_of_process(options.size, choice) for choice in choices},
    }
    result["load_after"] = list(os.getloadavg())
    text = markdown(result)
    write_json(options.output / f"blocks-{options.size}.json", result)
    replace_file(options.output / f"blocks-{options.size}.md", text.encode())
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="vit_base_224")
    parser.add_argument("--choices", nargs="+", default=["last:1", "last:3", "last:6"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a toy model")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/speed; with --quick runs/speed_quick")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.size, options.choices, options.rounds = "toy", ["last:1"], 2
    options.output = options.output or speed_folder(options.quick)
    return options


def _method(choice: str) -> str:
    return f"adaptformer:blocks={choice}"


def _time_steps(size: str, choices: list[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return wall-clock and CPU seconds of the steps of each choice, a list with one number for each round."""
    wall: dict[str, list[float]] = {choice: [] for choice in choices}
    cpu: dict[str, list[float]] = {choice: [] for choice in choices}
    with contextlib.ExitStack() as stack:
        steps = {choice: stack.enter_context(petune_step(SIZES[size], _method(choice))) for choice in choices}
        for number in range(rounds + 1):
            for choice, step in steps.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                step()
                if number:  # the first round allocates
                    wall[choice].append(time.perf_counter() - start)
                    cpu[choice].append(time.process_time() - cpu_start)
    return {"step_s": wall, "cpu_s": cpu}


def _memory_of_process(size: str, choice: str) -> dict[str, int]:
    command = [sys.executable, __file__, "--size", size, "--memory-of", choice]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    memory: dict[str, int] = json.loads(output.splitlines()[-1])
    return memory


def _measure_memory(size: str, choice: str) -> dict[str, int]:
    """Return the peak resident memory of this process after two steps, and before any."""
    peak = PeakMemory(CPU)
    before = peak.bytes()
    with petune_step(SIZES[size], _method(choice)) as step:
        step()
        step()
    return {"peak_bytes": peak.bytes(), "before_bytes": before}


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a measurement."""
    times, memory = result["step_s"], result["memory"]
    grown = {choice: row["peak_bytes"] - row["before_bytes"] for choice, row in memory.items()}
    lines = [
        f"AdaptFormer, {result['size']}, {len(times[ALL])} rounds, load {result['load'][0]:.1f}",
        "",
        "| blocks | step | relative to all | in CPU time | peak memory | relative to all | without the libraries |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for choice, seconds in times.items():
        peak = memory[choice]["peak_bytes"]
        lines.append(
            f"| {choice} | {statistics.median(seconds):.3f} s | {_relative(seconds, times[ALL])} | "
            f"{_relative(result['cpu_s'][choice], result['cpu_s'][ALL])} | {peak / 1e9:.2f} GB | "
            f"{peak / memory[ALL]['peak_bytes']:.2f} | {grown[choice] / max(1, grown[ALL]):.2f} |"
        )
    return "\n".join(lines) + "\n"


def _relative(seconds: list[float], of_all: list[float]) -> str:
    ratios = sorted(mine / theirs for mine, theirs in zip(seconds, of_all, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


if __name__ == "__main__":
    main()
