"""petune: one frozen Vision Transformer, many tasks. Importing it is cheap; torch comes when it is used."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from petune.injector.peft_hook import when_peft_is_imported

if TYPE_CHECKING:
    from petune.base.errors import AttachError, NotMergeable, PetuneError
    from petune.injector.attach import attach
    from petune.injector.attachment import Attachment
    from petune.injector.counts import Counts
    from petune.injector.edit import Edit
    from petune.injector.load import load
    from petune.injector.registry import list_tuners
    from petune.injector.tuner import Recipe, Tuner, TunerConfig
    from petune.plugin_dev.contract import ContractViolation, check_tuner
    from petune.runner.compare import CompareConfig, Comparison, compare
    from petune.runner.pretrain import PretrainConfig, pretrain
    from petune.runner.result import RunResult
    from petune.runner.run import run
    from petune.runner.run_config import RunConfig
    from petune.runner.sweep.search import sweep
    from petune.runner.sweep.trials import Sweep, SweepConfig
    from petune.serving.adapter_bank import AdapterBank
    from petune.serving.evaluation import Evaluation, evaluate
    from petune.serving.export import Exported, export
    from petune.serving.predict import Predictor, predict
    from petune.serving.share import pull, push
    from petune.sites.find import find_sites
    from petune.sites.site import Block, Site, Sites

__version__ = "0.1.0"

_HOMES = {
    "AttachError": "base.errors",
    "Attachment": "injector.attachment",
    "Block": "sites.site",
    "CompareConfig": "runner.compare",
    "Comparison": "runner.compare",
    "ContractViolation": "plugin_dev.contract",
    "Counts": "injector.counts",
    "Edit": "injector.edit",
    "Evaluation": "serving.evaluation",
    "Exported": "serving.export",
    "NotMergeable": "base.errors",
    "PetuneError": "base.errors",
    "Predictor": "serving.predict",
    "PretrainConfig": "runner.pretrain",
    "Recipe": "injector.tuner",
    "RunConfig": "runner.run_config",
    "RunResult": "runner.result",
    "Site": "sites.site",
    "Sites": "sites.site",
    "Sweep": "runner.sweep.trials",
    "SweepConfig": "runner.sweep.trials",
    "AdapterBank": "serving.adapter_bank",
    "Tuner": "injector.tuner",
    "TunerConfig": "injector.tuner",
    "attach": "injector.attach",
    "check_tuner": "plugin_dev.contract",
    "compare": "runner.compare",
    "evaluate": "serving.evaluation",
    "export": "serving.export",
    "find_sites": "sites.find",
    "load": "injector.load",
    "predict": "serving.predict",
    "pretrain": "runner.pretrain",
    "pull": "serving.share",
    "push": "serving.share",
    "run": "runner.run",
    "sweep": "runner.sweep.search",
    "list_tuners": "injector.registry",
}

__all__ = [
    "AdapterBank",
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
    "Tuner",
    "TunerConfig",
    "attach",
    "check_tuner",
    "compare",
    "evaluate",
    "export",
    "find_sites",
    "list_tuners",
    "load",
    "predict",
    "pretrain",
    "pull",
    "push",
    "run",
    "sweep",
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
