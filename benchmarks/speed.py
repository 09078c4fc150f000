"""Measure how fast petune trains: against other code on the same model, and against what the processor can do.

    python benchmarks/speed.py                      # everything, at most 12 minutes on an idle machine
    python benchmarks/speed.py --quick              # a toy model, to see that it runs
    python benchmarks/speed.py --sizes vit_nano --no-memory --compiled
    python benchmarks/speed.py --sizes vit_nano --no-memory --methods vpt ssf
    python benchmarks/speed.py --sizes vit_base_32 vit_base_224 --floor-alone 3  # three times, under five minutes

All steps of one size run in turns in one process: a round is one step of each, and one of the matrix product that the
model mostly consists of. A ratio is taken within a round, and shown as the median over rounds with its quartiles.
The floor is the time that the FLOPs of petune's step (torch's counter) take at the rate of that product.
Expected on an idle processor with bfloat16, two cores: at least 85 % of the floor; at least 3.5 times as fast as the
fp32 peers and 1.3 times as fast as PEFT's LoRA under autocast; injection within 2 % of the hand-written model; memory
at most 60 % of full fine-tuning's, and 35 % with checkpointing; ten epochs of a linear probe under 1.3 forward passes
over the images; input under 3 % of a step for vit_nano.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from result_files import need_same_size, speed_folder, write_json
from speed_peers import CPU, EXTRA, PEERS, SIZES, Size, methods_of, petune_step, trainer_of
from torch.nn import functional as F

from petune.base.files import replace_file
from petune.runner.provenance import provenance
from petune.training.evaluate import evaluate
from petune.training.precision import choose_precision

PETUNE, HAND_WRITTEN, INJECTED = "petune adaptformer", "hand-written, bare loop", "injected, bare loop"
MEMORY = ("adaptformer", "adaptformer, grad_checkpointing", "full, fp32", "full, petune's precision")


def main() -> None:
    options = _options()
    if options.memory_of:
        print(json.dumps(_measure_memory(options.memory_of, options.quick)))
        return
    if options.floor_alone:
        _print_floor_shares(options)
        return
    need_same_size(options.output / "speed.json", options.quick)
    start = time.perf_counter()
    small = SIZES["toy" if options.quick else "vit_nano"]
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "smoke": options.quick,
        "precision": choose_precision("auto", CPU),
        "provenance": provenance(CPU),
        "load": list(os.getloadavg()),
        "steps": {},
    }
    for name in ["toy"] if options.quick else options.sizes:
        result["steps"][name] = _time_steps(SIZES[name], options)
        print(_table(result["steps"][name]), flush=True)
    result["probe"] = _time_linear_probe(small, 24 if options.quick else 1024)
    result["input"] = _input_share(small)
    result["start"] = {command: _start_time(command, 1 if options.quick else 8) for command in ("--help", "methods")}
    if options.memory:
        result["memory"] = {name: _memory_of_process(name, options.quick) for name in MEMORY}
    result["time_s"] = time.perf_counter() - start
    result["load_after"] = list(os.getloadavg())
    text = markdown(result)
    write_json(options.output / "speed.json", result)
    replace_file(options.output / "speed.md", text.encode())
    print(text, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["vit_base_32", "vit_base_224", "vit_nano"])
    parser.add_argument("--seconds", type=float, default=130, help="per size; at least 3 rounds")
    parser.add_argument("--rounds", type=int, default=15, help="most rounds per size")
    parser.add_argument("--compiled", action="store_true", help="also petune's step compiled; a minute more per size")
    parser.add_argument("--methods", nargs="+", default=[], help="also petune's steps with these, such as vpt ssf")
    parser.add_argument("--floor-alone", type=int, metavar="TIMES", help="only petune's step against the floor")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--quick", action="store_true", help="a toy model")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/speed; with --quick runs/speed_quick")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output = options.output or speed_folder(options.quick)
    return options


def _time_steps(size: Size, options: argparse.Namespace) -> dict[str, Any]:
    """Time all steps in rounds, and compute the ratios."""
    peers = PEERS | (EXTRA if options.compiled else {}) | methods_of(options.methods)
    dtype = torch.bfloat16 if choose_precision("auto", CPU) == "bf16" else torch.float32
    product, product_flops = _product(size, dtype)
    with contextlib.ExitStack() as stack:
        steps = {name: stack.enter_context(make(size)) for name, make in peers.items()}
        flops = _flops(steps[PETUNE])
        for step in steps.values():  # the first step allocates, compiles, makes the optimizer's state
            step()
        times: dict[str, list[float]] = {name: [] for name in steps}
        product_times: list[float] = []
        end, names = time.perf_counter() + (0 if options.quick else options.seconds), list(steps)
        while len(product_times) < 3 or (time.perf_counter() < end and len(product_times) < options.rounds):
            product_times.append(min(_timed(product) for _ in range(5)))
            names = names[1:] + names[:1]  # no step always follows the same other one
            for name in names:
                times[name].append(_timed(steps[name]))
    floors = [flops / product_flops * time_s for time_s in product_times]
    return {
        "size": size.name,
        "flops": flops,
        "products_gflop_per_s": _spread([product_flops / time_s / 1e9 for time_s in product_times]),
        "times_s": times,
        "step_s": {name: _spread(t) for name, t in times.items()},
        "floor_share": _spread([a / b for a, b in zip(floors, times[PETUNE], strict=True)]),
        "petune_is_faster_by": {
            name: _spread([a / b for a, b in zip(t, times[PETUNE], strict=True)]) for name, t in times.items()
        },
        "injection": _spread([a / b for a, b in zip(times[INJECTED], times[HAND_WRITTEN], strict=True)]),
    }


def _print_floor_shares(options: argparse.Namespace) -> None:
    """Print the share of the floor that petune's step reaches, several times in a row."""
    dtype = torch.bfloat16 if choose_precision("auto", CPU) == "bf16" else torch.float32
    for _ in range(options.floor_alone):
        for name in ["toy"] if options.quick else options.sizes:
            product, product_flops = _product(SIZES[name], dtype)
            with petune_step(SIZES[name]) as step:
                floors = _flops(step) / product_flops
                step()
                shares = [floors * min(_timed(product) for _ in range(5)) / _timed(step) for _ in range(8)]
            print(f"{name}: {_percent(_spread(shares))} of the floor, load {os.getloadavg()[0]:.1f}", flush=True)


def _product(size: Size, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """Return the largest matrix product of the model (all tokens through the MLP's first layer), and its FLOPs."""
    x, w = torch.randn(size.rows, size.embed_dim).to(dtype), torch.randn(4 * size.embed_dim, size.embed_dim).to(dtype)
    return lambda: F.linear(x, w), 2 * size.rows * 4 * size.embed_dim**2


def _flops(step: Callable[[], object]) -> int:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def product(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(x) * weight[0]

    # the counter does not see fused attention on a CPU, and does not know the kernel of speed/onednn_linear
    known = {torch.ops.mkldnn._linear_pointwise: product}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=known) as counter:
        step()
    return int(counter.get_total_flops())


def _timed(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high, "count": len(values)}


def _time_linear_probe(size: Size, images: int) -> dict[str, float]:
    """Time ten epochs of a linear probe, evaluations included, and one forward pass over all its images."""
    import torchmetrics.classification  # noqa: F401  (importing takes a second, which is not training)

    with tempfile.TemporaryDirectory() as directory:
        settings = {"augment": "none", "epochs": 10, "cache_features": "always", "eval_batch_size": size.batch_size}
        trainer = trainer_of(size, "linear", Path(directory), images=images, val=images // 8, **settings)
        forwards = [_timed(lambda: _forward_all(trainer))]
        fit_s = _timed(trainer.fit)
        forwards.append(_timed(lambda: _forward_all(trainer)))
    return {"ten_epochs_s": fit_s, "forward_s": min(forwards), "forwards": fit_s / min(forwards)}


def _forward_all(trainer: Any) -> None:
    """Evaluate all images of val and train, without cached features."""
    for split in (trainer.job.dataset.val, trainer.job.dataset.train):
        evaluate(trainer.job, split, trainer.precision, stop=trainer.stop)


def _input_share(size: Size) -> dict[str, float]:
    """Compare the time from stored images to augmented, normalized batches with that of the whole step."""
    with tempfile.TemporaryDirectory() as directory, petune_step(size) as step:
        trainer = trainer_of(size, "linear", Path(directory), images=20 * size.batch_size)
        batches = iter(trainer.batches.epoch(0))
        next(batches)
        step()
        pairs = [(_timed(lambda: next(batches)), _timed(step)) for _ in range(10)]
    return _spread([a / (a + b) for a, b in pairs])


def _start_time(command: str, times: int) -> dict[str, float]:
    words = [sys.executable, "-m", "petune", command]

    def run() -> None:
        subprocess.run(words, check=True, capture_output=True)

    return _spread([_timed(run) for _ in range(times)][times // 4 :])  # the first ones fill the disk cache


def _memory_of_process(name: str, quick: bool) -> dict[str, int]:
    words = [sys.executable, __file__, "--memory-of", name, *(["--quick"] if quick else [])]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _measure_memory(name: str, quick: bool) -> dict[str, int]:
    """Return the peak resident memory (VmHWM) of this process after two steps, and before any."""
    from speed_peers import full

    from petune.runner.provenance import PeakMemory

    peak = PeakMemory(CPU)
    before = peak.bytes()
    size = SIZES["toy"] if quick else Size("", "vit_base_patch16_224", 224, 16, 768, 12, 12, 32)
    context = {
        "adaptformer": lambda: petune_step(size),
        "adaptformer, grad_checkpointing": lambda: petune_step(size, grad_checkpointing=True),
        "full, fp32": lambda: full(size),
        "full, petune's precision": lambda: petune_step(size, "full"),
    }[name]()
    with context as step:
        step()
        step()
    return {"peak_bytes": peak.bytes(), "before_bytes": before}


def _table(result: dict[str, Any]) -> str:
    share, rate = result["floor_share"], result["products_gflop_per_s"]
    lines = [
        f"{result['size']}: {result['flops'] / 1e9:,.0f} GFLOP per step, matrix product at {rate['median']:,.0f} "
        f"GFLOP/s ({rate['low']:,.0f} to {rate['high']:,.0f}), {share['count']} rounds. Share of the floor: "
        f"{_percent(share)}. Injected relative to hand-written: {_times(result['injection'], 3)}.",
        "",
        "| step | seconds | relative to petune |",
        "| --- | ---: | ---: |",
    ]
    for name, step in result["step_s"].items():
        ratio = result["petune_is_faster_by"][name]
        lines.append(f"| {name} | {_times(step, 3)} | {_times(ratio, 2)} |")
    return "\n".join(lines)


def _times(spread: dict[str, float], digits: int) -> str:
    return "{median:.{d}f} ({low:.{d}f} to {high:.{d}f})".format(**spread, d=digits)


def _percent(spread: dict[str, float]) -> str:
    return "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * spread[key] for key in ("median", "low", "high")))


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    machine, probe = result["provenance"], result["probe"]
    parts = [
        "# Speed",
        f"`{result['command']}` took {result['time_s'] / 60:.1f} minutes on {machine['device']}, "
        f"{machine['threads']} threads, precision {result['precision']}, "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + f"; load average {result['load'][0]:.1f} before and {result['load_after'][0]:.1f} after. "
        "Medians over rounds, quartiles in brackets.",
        *(_table(steps) for steps in result["steps"].values()),
        f"Ten epochs of a linear probe with cached features: {probe['forwards']:.2f} forward passes over the images.",
        f"Input: {_percent(result['input'])} of a step.",
        "; ".join(f"`petune {command}`: {_times(s, 2)} s" for command, s in result["start"].items()) + ".",
    ]
    if "memory" in result:
        whole = result["memory"]["full, fp32"]["peak_bytes"]
        rows = [
            f"| {name} | {m['peak_bytes'] / 1e9:.2f} | {100 * m['peak_bytes'] / whole:.1f} % |"
            for name, m in result["memory"].items()
        ]
        title = "Peak resident memory of a process that takes two steps of ViT-B at 224, batch 32:"
        parts.append("\n".join([title, "", "| step | GB | relative to full, fp32 |", "| --- | ---: | ---: |", *rows]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
