"""petune: one frozen Vision Transformer, many tasks. Importing it is cheap; torch comes when it is used."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from petune.peft_hook import when_peft_is_imported

if TYPE_CHECKING:
    from petune.anatomy import find_sites
    from petune.attach import attach
    from petune.attachment import Attachment
    from petune.compare import CompareConfig, Comparison, compare
    from petune.counts import Counts
    from petune.edit import Edit
    from petune.errors import AttachError, NotMergeable, PetuneError
    from petune.evaluation import Evaluation, evaluate
    from petune.export import Exported, export
    from petune.predict import Predictor, predict
    from petune.pretrain import PretrainConfig, pretrain
    from petune.registry import tuners
    from petune.results import RunResult
    from petune.run import RunConfig, run
    from petune.share import pull, push
    from petune.sites import Block, Site, Sites
    from petune.state import load
    from petune.sweep import sweep
    from petune.tasks import Tasks
    from petune.testing import ContractViolation, check_tuner
    from petune.trials import Sweep, SweepConfig
    from petune.tuner import Recipe, Tuner, TunerConfig

__version__ = "0.1.0"

_HOMES = {
    "AttachError": "errors",
    "Attachment": "attachment",
    "Block": "sites",
    "CompareConfig": "compare",
    "Comparison": "compare",
    "ContractViolation": "testing",
    "Counts": "counts",
    "Edit": "edit",
    "Evaluation": "evaluation",
    "Exported": "export",
    "NotMergeable": "errors",
    "PetuneError": "errors",
    "Predictor": "predict",
    "PretrainConfig": "pretrain",
    "Recipe": "tuner",
    "RunConfig": "run",
    "RunResult": "results",
    "Site": "sites",
    "Sites": "sites",
    "Sweep": "trials",
    "SweepConfig": "trials",
    "Tasks": "tasks",
    "Tuner": "tuner",
    "TunerConfig": "tuner",
    "attach": "attach",
    "check_tuner": "testing",
    "compare": "compare",
    "evaluate": "evaluation",
    "export": "export",
    "find_sites": "anatomy",
    "load": "state",
    "predict": "predict",
    "pretrain": "pretrain",
    "pull": "share",
    "push": "share",
    "run": "run",
    "sweep": "sweep",
    "tuners": "registry",
}

__all__ = [
    "AttachError",
    "Attachment",
    "Block",
    "CompareConfig",
    "Comparison",
    "ContractViolation",
    "Counts",
    "Edit",
    "Evaluation",
    "Exported",
    "NotMergeable",
    "PetuneError",
    "Predictor",
    "PretrainConfig",
    "Recipe",
    "RunConfig",
    "RunResult",
    "Site",
    "Sites",
    "Sweep",
    "SweepConfig",
    "Tasks",
    "Tuner",
    "TunerConfig",
    "attach",
    "check_tuner",
    "compare",
    "evaluate",
    "export",
    "find_sites",
    "load",
    "predict",
    "pretrain",
    "pull",
    "push",
    "run",
    "sweep",
    "tuners",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'petune' has no attribute {name!r}")
    return getattr(import_module(f"petune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """petune.attach, petune.run, … are functions, though modules of the same names exist.

    The import system binds every submodule on its package when it is first imported, at whatever time that is;
    those bindings are left out, so that `__getattr__` finds the function at all times.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

when_peft_is_imported()
