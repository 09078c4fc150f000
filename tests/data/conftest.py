"""A separate cache directory for every test, and datasets of made-up distributions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fake_plugin import fake

__all__ = ["cache", "fake"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PETUNE_CACHE", str(path))
    return path
