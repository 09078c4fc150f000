"""One piece of a suite, and the configurations that it consists of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import petune
from petune.base.config import Config
from petune.runner.run_name import directory_name


class Rates(Config):
    """The learning rates to try for each method, on val, with one seed.

    Attributes:
        values: By method; `default` is for methods that are not listed.
        run: Options in which the trials differ from the comparison, such as fewer epochs.
    """

    values: dict[str, tuple[float, ...]]
    run: dict[str, Any] = {}


class Piece(Config):
    """A pretraining if needed, the learning rates, and the comparison; arguments of `petune.pretrain` and so on."""

    pretrain: dict[str, Any] | None = None
    rates: Rates | None = None
    compare: dict[str, Any]


def merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with `overrides`, key by key; a pretraining or rates that `values` lacks are not added."""
    result = dict(values)
    for key, value in overrides.items():
        if key in {"pretrain", "rates"} and not values.get(key):
            continue
        section = result.get(key)
        result[key] = merged(section, value) if isinstance(value, dict) and isinstance(section, dict) else value
    return result


def pretrain_config(piece: Piece, directory: Path) -> petune.PretrainConfig | None:
    """Return the configuration of the pretraining, if the piece has one."""
    if piece.pretrain is None:
        return None
    return petune.PretrainConfig.build(piece.pretrain | {"output": directory / "pretrain", "resume": True}, "pretrain")


def rate_config(piece: Piece, directory: Path, method: str) -> petune.SweepConfig:
    """Return the configuration of the sweep of a method's learning rate, lowest first."""
    assert piece.rates is not None
    values = sorted(piece.rates.values.get(method) or piece.rates.values["default"])
    run = merged(_shared_run(piece, directory), piece.rates.run) | {"method": method}
    fields = {"search": {"train.lr": values}, "trials": len(values), "test": False, "run": run}
    return petune.SweepConfig.build(
        fields | {"output": directory / "rates" / directory_name(method)}, f"rates of {method}"
    )


def compare_config(
    piece: Piece, directory: Path, methods: tuple[str, ...], lrs: Mapping[str, float]
) -> petune.CompareConfig:
    """Return the configuration of the comparison, with the learning rate of each method."""
    fields = {
        "methods": methods,
        "run": _shared_run(piece, directory),
        "lrs": dict(lrs),
        "output": directory / "compare",
    }
    return petune.CompareConfig.build(piece.compare | fields, "compare")


def _shared_run(piece: Piece, directory: Path) -> dict[str, Any]:
    weights = {} if piece.pretrain is None else {"weights": str(directory / "pretrain")}
    return piece.compare["run"] | weights
