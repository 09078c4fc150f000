"""`check_tuner`: the contract in executable form, for authors of tuners."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from petune.base.arguments import check_arguments
from petune.base.errors import ContractViolation
from petune.injector.registry import build_tuner
from petune.injector.tuner import Tuner
from petune.plugin_dev.properties import PROPERTIES
from petune.plugin_dev.tiny_models import tiny_timm
from petune.plugin_dev.trial import Trial


@dataclass(frozen=True)
class Finding:
    """The result for one property.

    Attributes:
        name: The property.
        requirement: What must hold.
        problem: What is wrong; empty if the property holds.
    """

    name: str
    requirement: str
    problem: str


def check_tuner(tuner: str | Tuner[Any], model: nn.Module | None = None, **options: Any) -> list[str]:
    """Check the contract of a tuner on a small model.

    Args:
        tuner: A registered name with `options`, or a Tuner.
        model: A classifier with a head; a tiny timm ViT by default. It is copied.
        **options: The tuner's options.

    Returns:
        The names of the properties, all of which hold.

    Raises:
        ContractViolation: The first property that does not hold.
        AttachError: The tuner refuses this model.
    """
    check_arguments("petune.check_tuner", tuner=(tuner, str | Tuner), model=(model, nn.Module | None))
    names = []
    for finding in examine(tuner, model, **options):
        if finding.problem:
            name = tuner if isinstance(tuner, str) else type(tuner).__name__
            raise ContractViolation(f"{name}: {finding.name}: {finding.problem} (required: {finding.requirement})")
        names.append(finding.name)
    return names


def examine(tuner: str | Tuner[Any], model: nn.Module | None = None, **options: Any) -> Iterator[Finding]:
    """Yield the finding for each property, as `check_tuner`, without stopping at the first that does not hold."""
    built = build_tuner(tuner, **options)
    name = tuner if isinstance(tuner, str) else type(tuner).__name__.lower()
    trial = Trial(built, model if model is not None else tiny_timm(), name)
    for prop in PROPERTIES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                problem = prop.problem(trial)
            except Exception as error:  # whatever an author's code raises is a finding
                problem = f"{type(error).__name__}: {error}"
        yield Finding(prop.name, prop.requirement, problem)
