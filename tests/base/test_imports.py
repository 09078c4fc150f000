"""Settings that the command line makes before it imports torch."""

from __future__ import annotations

import os

import pytest

from petune.base.imports import use_huge_pages


def test_huge_pages_are_asked_for_unless_the_user_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "THP_MEM_ALLOC_ENABLE", "0")
    use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    monkeypatch.delitem(os.environ, "THP_MEM_ALLOC_ENABLE")
    use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
