"""`import petune` makes petune's tuners PEFT methods, without importing PEFT: they are entered once somebody does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_peft_is_imported() -> None:
    """Enter petune's tuners in PEFT now, if it is imported already, or else as soon as it is."""
    if "peft" in sys.modules:
        _enter()
    elif not any(isinstance(finder, AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterPeft())


class AfterPeft(MetaPathFinder):
    """Finds `peft` as the other finders do, and is told when it has been run; all other names pass by."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The others' spec, with a loader that enters petune's tuners after its work; None for any other name."""
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _enter()

        loader.exec_module = exec_module


def _enter() -> None:
    from petune.base.errors import PetuneError

    try:
        from petune.injector.peft_type import register

        register()
    except (ImportError, AttributeError, PetuneError):
        return  # an older PEFT, or one that is not fully imported: all else works without
