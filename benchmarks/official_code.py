"""Import the authors' code from clones, although newer libraries are installed. Nothing of it is copied here."""

from __future__ import annotations

import collections.abc
import contextlib
import importlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import timm.layers

OLD_NAMES = {"timm.models.layers.helpers": timm.layers.helpers, "timm.models.layers.mlp": timm.layers.mlp}
"""Modules that timm has moved since."""


class Stub(ModuleType):
    """A module that is imported but not needed; every name in it is an empty class, which also decorates."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        return "" if name == "__version__" else type(name, (Empty,), {})


class Empty:
    """Does nothing, whatever it is called with; as a decorator it returns what it decorates."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __call__(self, decorated: Any) -> Any:
        return decorated

    @classmethod
    def register_module(cls) -> Any:
        """Return a decorator, as registries of mmcv do."""
        return cls()


def clone_of(clones: Path, repository: str) -> Path | None:
    """Return the clone `OWNER+NAME` of `OWNER/NAME`, with or without a work tree; None if there is none."""
    path = clones / repository.replace("/", "+")
    return path if path.exists() else None


def commit_of(clone: Path) -> str:
    """Return the commit of a clone."""
    return _git(clone, "rev-parse", "HEAD").decode().strip()


@contextlib.contextmanager
def extracted(clone: Path, folder: str) -> Iterator[Path]:
    """Write a folder of a clone's commit, or several with spaces between, into a temporary directory; `.` is all."""
    with tempfile.TemporaryDirectory() as directory:
        archive = _git(clone, "archive", "--format=tar", "HEAD", "--", *folder.split())
        subprocess.run(["tar", "x", "-C", directory], input=archive, check=True)
        yield Path(directory)


def load(
    root: Path,
    module: str,
    *,
    stubs: Sequence[str] = (),
    packages: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Any:
    """Import a module of a clone; afterwards Python knows neither it nor its neighbors by name.

    Args:
        root: What the module's name starts from.
        module: Its name, with dots.
        stubs: Modules that it imports and does not need here.
        packages: Packages whose own `__init__.py` is not run.
        values: What names in the stubs stand for, where an empty class is not enough, such as a base class.
    """
    with warnings.catch_warnings(action="ignore"):  # timm says that this name is old
        old_layers = importlib.import_module("timm.models.layers")
    before = dict(sys.modules)
    sys.path.insert(0, str(root))
    for name, old in OLD_NAMES.items():
        sys.modules[name] = old
        setattr(old_layers, name.rpartition(".")[2], old)
    six = Stub("torch._six")
    six.container_abcs = collections.abc
    sys.modules["torch._six"] = six
    for name in (*packages, *stubs):
        sys.modules[name] = Stub(name)
        sys.modules[name].__path__ = [str(root / name.replace(".", "/"))] if name in packages else []
    for name, value in (values or {}).items():
        setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], value)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(root))
        for name in set(sys.modules) - set(before):
            file = getattr(sys.modules[name], "__file__", None) or ""
            if isinstance(sys.modules[name], Stub) or file.startswith(str(root)):
                del sys.modules[name]
        sys.modules.update({name: before[name] for name in (*packages, *stubs) if name in before})


def _git(clone: Path, *words: str) -> bytes:
    where = clone / ".git" if (clone / ".git").exists() else clone
    return subprocess.run(["git", f"--git-dir={where}", *words], check=True, stdout=subprocess.PIPE).stdout
