"""`check_tuner`: the contract in executable form, for authors of tuners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from petune.base.arguments import check_arguments
from petune.injector.registry import build_tuner
from petune.injector.tuner import Tuner
from petune.plugin_dev.finding import Finding, examine_all, names_of
from petune.plugin_dev.hidden_prompts import warn_of_hidden_prompts
from petune.plugin_dev.properties import PROPERTIES
from petune.plugin_dev.surroundings import Surroundings
from petune.plugin_dev.tiny_models import tiny_timm
from petune.plugin_dev.trial import Trial


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
    name = tuner if isinstance(tuner, str) else type(tuner).__name__
    return names_of(examine(tuner, model, **options), name)


def examine(tuner: str | Tuner[Any], model: nn.Module | None = None, **options: Any) -> Iterator[Finding]:
    """Yield the finding for each property, as `check_tuner`, without stopping at the first that does not hold."""
    built = build_tuner(tuner, **options)
    name = tuner if isinstance(tuner, str) else type(tuner).__name__.lower()
    model = model if model is not None else tiny_timm()
    before = Surroundings.of(model)
    try:
        trial = Trial(built, model, name)
    except Exception as error:
        changed = before.restored()
        if not changed:
            raise
        first = PROPERTIES[0]
        yield Finding(first.name, first.requirement, f"{changed}; then attaching fails: {error}")
        return
    warn_of_hidden_prompts(trial.att.edit_log)
    yield from examine_all(PROPERTIES, trial)
