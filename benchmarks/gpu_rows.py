"""Measure one row of benchmarks/gpu.py: a training step, a batch of mixed adapters, or an int8 backbone."""

from __future__ import annotations

import contextlib
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_steps import GPU_SIZES, REFERENCE, STEPS, StepKey
from speed_peers import Size, Step
from torch._dynamo import config as dynamo_config
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import petune
from petune.runner.run_config import RunConfig
from petune.training.config import TrainConfig
from petune.training.speed.speedups import MAX_COMPILED

BLOCK_S = 0.4
"""Steps are timed in blocks of about this time, so that the GPU is waited for once per block."""
MAX_ROUNDS = 15


@dataclass
class Resident:
    """A step that is on the GPU, ready to be timed."""

    step: Step
    stack: contextlib.ExitStack
    build_s: float
    peak_bytes: int | None
    flops: int | None


@dataclass
class StepBench:
    """Times steps in turns with the step that each is compared with.

    Attributes:
        device: Where they run.
        seconds: Time of the rounds of one row.
        resident: What is on the GPU now.
        flops: By size and name, counted without compilation.
    """

    device: torch.device
    seconds: float
    resident: dict[StepKey, Resident] = field(default_factory=dict)
    flops: dict[tuple[str, str], int] = field(default_factory=dict)

    def measure(self, key: StepKey) -> dict[str, Any]:
        """Return the row of a step."""
        keep = {key, key.peer, StepKey(key.size, REFERENCE, key.compiled)}
        for other in [k for k in self.resident if k not in keep]:
            self.release(other)
        own, peer = self._build(key), self._build(key.peer)
        times = self.in_turns(own.step, peer.step, same=key == key.peer)
        step_s, images = _spread(times[0]), GPU_SIZES[key.size].batch_size
        flops = self.flops.get((key.size, key.name))
        return {
            "batch_size": images,
            "step_s": step_s,
            "images_per_s": images / step_s["median"],
            "against": str(key.peer.name),
            "time_relative_to_it": _spread([a / b for a, b in zip(*times, strict=True)]),
            "flops": flops,
            "tflops": flops / step_s["median"] / 1e12 if flops else None,
            "peak_bytes": own.peak_bytes,
            "build_s": own.build_s,
        }

    def _build(self, key: StepKey) -> Resident:
        if key in self.resident:
            return self.resident[key]
        if key.compiled:  # torch would leave the ninth model of a class uncompiled
            dynamo_config.recompile_limit = MAX_COMPILED
        baseline = self._allocated()
        start, stack = time.perf_counter(), contextlib.ExitStack()
        try:
            step = stack.enter_context(STEPS[key.name](GPU_SIZES[key.size], self.device, key.compiled))
            self._block(step, 1)
            build_s = time.perf_counter() - start
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self._block(step, 2)
            peak = torch.cuda.max_memory_allocated(self.device) - baseline if self.device.type == "cuda" else None
            if not key.compiled:
                with FlopCounterMode(display=False) as counter:
                    step()
                self.flops[key.size, key.name] = int(counter.get_total_flops())
        except BaseException:
            stack.close()
            raise
        self.resident[key] = Resident(step, stack, build_s, peak, self.flops.get((key.size, key.name)))
        return self.resident[key]

    def release(self, key: StepKey) -> None:
        """Remove a step from the GPU."""
        self.resident.pop(key).stack.close()
        self.free()

    def release_all(self) -> None:
        """Remove all steps from the GPU, also after a failure that left it in a bad state."""
        for key in list(self.resident):
            with contextlib.suppress(Exception):
                self.resident.pop(key).stack.close()
        with contextlib.suppress(Exception):
            self.free()

    def free(self) -> None:
        """Return memory that nothing uses."""
        if self.device.type == "cuda":
            import gc

            gc.collect()
            torch.cuda.empty_cache()

    def in_turns(
        self, own: Callable[[], object], peer: Callable[[], object], *, same: bool = False
    ) -> tuple[list[float], list[float]]:
        """Return the times of one call of each, in seconds, round by round; the order changes in every round."""
        block_s = min(BLOCK_S, self.seconds)
        counts = [max(1, int(block_s / max(1e-6, self._block(call, 3)))) for call in (own, peer)]
        times: tuple[list[float], list[float]] = ([], [])
        end = time.perf_counter() + self.seconds
        while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < MAX_ROUNDS):
            for number in (0, 1) if len(times[0]) % 2 == 0 else (1, 0):
                if not (same and number):
                    times[number].append(self._block((own, peer)[number], counts[number]))
            if same:
                times[1].append(times[0][-1])
        return times

    def _block(self, call: Callable[[], object], count: int) -> float:
        """Return the mean time of some calls, which the GPU has finished."""
        self._wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self._wait()
        return (time.perf_counter() - start) / count

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def product_tflops(self, size: Size) -> float:
        """Return the rate of the model's largest matrix product in bfloat16 (all tokens, first layer of the MLP)."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        x = torch.randn(size.rows, size.embed_dim, device=self.device, dtype=dtype)
        w = torch.randn(4 * size.embed_dim, size.embed_dim, device=self.device, dtype=dtype)
        seconds = min(self._block(lambda: F.linear(x, w), 20) for _ in range(5))
        return 2 * size.rows * 4 * size.embed_dim**2 / seconds / 1e12


def measure_bank(bench: StepBench, size: Size, method: str, images: int, adapters: int) -> dict[str, Any]:
    """Compare a batch for several adapters with the same batch for one adapter that is attached."""
    device, model = bench.device, size.model().to(bench.device).eval()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        paths = [Path(directory) / str(number) for number in range(adapters)]
        single = copy.deepcopy(model)
        attachment = petune.attach(copy.deepcopy(model), method)
        for path in paths:
            for parameter in attachment.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
            attachment.save(path)
        petune.load(single, paths[0])
        bank, load_s = petune.AdapterBank(model), []
        for number, path in enumerate(paths):
            start = time.perf_counter()
            bank.load(str(number), path)
            load_s.append(time.perf_counter() - start)
    x = torch.randn(images, 3, size.img_size, size.img_size, device=device)
    names = [str(number % adapters) for number in range(images)]
    with torch.no_grad(), autocast:
        first = bank(x[:1], names[:1])[0].float()
        difference = float((first - single(x[:1])[0].float()).abs().max())
        mixed, alone = bench.in_turns(lambda: bank(x, names), lambda: single(x))
    return {
        "images": images,
        "adapters": adapters,
        "batch_s": _spread(mixed),
        "images_per_s": images / _spread(mixed)["median"],
        "throughput_relative_to_one": _spread([b / a for a, b in zip(mixed, alone, strict=True)]),
        "first_load_s": load_s[0],
        "load_s": statistics.median(load_s[1:] or load_s),
        "largest_difference": difference,
    }


def base_precision_field() -> str | None:
    """Return where the number format of frozen weights is an option: `train`, `run`, or None if there is none yet."""
    name = "base_precision"
    return "train" if name in TrainConfig.model_fields else "run" if name in RunConfig.model_fields else None


def measure_int8(size: Size, device: torch.device, images: int | None = None) -> dict[str, Any]:
    """Train AdaptFormer on digits, with the backbone in int8 and in bfloat16.

    Args:
        size: The backbone.
        device: Where it trains.
        images: Of each class, for one epoch; None trains on all for five.
    """
    option = base_precision_field()
    if option is None:
        raise LookupError("this petune has no base_precision")
    results = {}
    for precision in (None, "int8"):
        train = {
            "epochs": 5 if images is None else 1,
            "batch_size": size.batch_size,
            "augment": "none",
            "cache_features": "never",
        }
        fields: dict[str, Any] = {"train": train}
        if precision is not None:
            (train if option == "train" else fields)["base_precision"] = precision  # type: ignore[index]
        with tempfile.TemporaryDirectory() as directory:
            results[precision] = petune.run(
                method="adaptformer",
                backbone=size.timm_name,
                backbone_options={k: v for k, v in size.shape.items() if k in ("depth", "embed_dim", "num_heads")},
                weights="none",
                image_size=size.img_size,
                patch_size=size.patch_size,
                dataset="digits",
                shots=images,
                device=str(device),
                output=Path(directory) / "run",
                **fields,
            )
    plain, int8 = results[None], results["int8"]
    return {
        "batch_size": size.batch_size,
        "images_per_s": int8.images_per_s,
        "time_relative_to_bf16": plain.images_per_s / int8.images_per_s,
        "peak_bytes": int8.peak_memory_bytes,
        "memory_relative_to_bf16": int8.peak_memory_bytes / plain.peak_memory_bytes,
    }


def _spread(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high, "count": len(values)}
