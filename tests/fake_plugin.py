"""A fixture that registers tuners or datasets of a made-up distribution, without installing anything."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Fake = Callable[..., None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """Return a function to call as `fake("petune-bad", entry={"bad": "petune_bad:Bad"}, code="...")`."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)  # for commands in a process of their own
    before = set(sys.modules)

    def make(
        name: str, entry: dict[str, str], code: str | None = None, requires: str = "", group: str = "petune.tuners"
    ) -> None:
        info = site / f"{name.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        needs = f"Requires-Dist: {requires}\n" if requires else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n{needs}")
        points = "".join(f"{left} = {right}\n" for left, right in entry.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{points}")
        if code is not None:
            (site / f"{next(iter(entry.values())).partition(':')[0]}.py").write_text(code)

    yield make
    for module in set(sys.modules) - before:
        if module.startswith("petune_fake"):
            del sys.modules[module]
