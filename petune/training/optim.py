"""Optimizer and schedule, both timm's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from petune.injector.param_groups import param_groups
from petune.training.config import TrainConfig


def create_optimizer(
    parameters: Mapping[str, nn.Parameter],
    no_decay: set[str],
    config: TrainConfig,
    lr_scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Create an optimizer over exactly `parameters`.

    Args:
        parameters: By name. With `decay_vectors` all get weight decay, else all but vectors; see `param_groups`.
        no_decay: Names of further parameters without weight decay; see `undecayed_keys`.
        config: With `lr`, `weight_decay` and `optimizer` filled in.
        lr_scales: Factor of the learning rate by name, which timm's schedules apply; None has one rate for all.
    """
    import timm.optim

    decay = config.weight_decay or 0.0
    if config.decay_vectors:
        groups: list[dict[str, Any]] = [{"params": list(parameters.values()), "weight_decay": decay}]
    else:
        groups = param_groups(parameters, decay, no_decay)
    if lr_scales is not None:
        groups = _split_by_scale(groups, {id(p): lr_scales[name] for name, p in parameters.items()})
    optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
        groups,
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=decay,
        **_fused(str(config.optimizer), parameters.values()),
    )
    if "muon" in str(config.optimizer) and not any(p.is_cuda for p in parameters.values()):
        _step_muon_in_float32(optimizer)
    return optimizer


def _split_by_scale(groups: Iterable[Mapping[str, Any]], scale_of: Mapping[int, float]) -> list[dict[str, Any]]:
    """Divide groups into those with one factor of the learning rate."""
    divided = []
    for group in groups:
        for scale in sorted({scale_of[id(p)] for p in group["params"]}, reverse=True):
            members = [p for p in group["params"] if scale_of[id(p)] == scale]
            divided.append({**group, "params": members, "lr_scale": scale})
    return divided


def peak_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the current learning rate of parameters with a factor of 1."""
    group = optimizer.param_groups[0]
    return float(group["lr"] / group.get("lr_scale", 1.0))


def create_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> Any:
    """Create timm's schedule. It is moved by `step_update(step)` alone, so it has no state to save."""
    from timm.scheduler import CosineLRScheduler, StepLRScheduler

    warmup = config.warmup_steps(total_steps)
    shared = {"warmup_t": warmup, "warmup_lr_init": 0.0, "warmup_prefix": True, "t_in_epochs": False}
    # a cosine of one step is its first value, and timm's logs that it has no effect
    if config.schedule == "constant" or total_steps - warmup == 1:
        return StepLRScheduler(optimizer, decay_t=total_steps + 1, **shared)
    return CosineLRScheduler(optimizer, t_initial=total_steps - warmup, **shared)


def _fused(name: str, parameters: Iterable[nn.Parameter]) -> dict[str, bool]:
    """Use one kernel for all parameters on a GPU, if torch's optimizer of that name has one.

    Not on a CPU: a step is a thousandth of the forward there, and it would round differently than in older runs.
    """
    import timm.optim

    optimizer_class = timm.optim.get_optimizer_class(name, bind_defaults=False)
    can_fuse = optimizer_class.__module__.startswith("torch.")
    can_fuse = can_fuse and "fused" in inspect.signature(optimizer_class).parameters
    on_gpu = all(p.device.type == "cuda" and p.is_floating_point() for p in parameters)
    return {"fused": True} if can_fuse and on_gpu else {}


def _step_muon_in_float32(optimizer: torch.optim.Optimizer) -> None:
    """Let Muon's steps run Newton-Schulz in float32 instead of bfloat16.

    A processor without bfloat16 emulates it at a 400th of the speed of float32 (0.3 against 130 GFLOP/s on AMD EPYC
    7003: 4.3 s a step for vit_nano instead of 0.1 s). timm's Muon has no argument for it.
    """
    step = optimizer.step

    @functools.wraps(step)
    def step_in_float32(*args: Any, **kwargs: Any) -> Any:
        with _newton_schulz_in_float32():
            return step(*args, **kwargs)

    optimizer.step = step_in_float32  # type: ignore[method-assign]


@contextmanager
def _newton_schulz_in_float32() -> Iterator[None]:
    from timm.optim import muon

    original = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = functools.partial(original, dtype=torch.float32)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = original
