"""Settings that the command line makes before it imports torch."""

from __future__ import annotations

import gc
import os

import pytest

from petune.base import imports


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports.PROGRAM, "is_own", False)
    monkeypatch.setitem(os.environ, "THP_MEM_ALLOC_ENABLE", "0")


def test_huge_pages_are_asked_for_unless_the_user_has_decided() -> None:
    imports.prepare_program()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    del os.environ["THP_MEM_ALLOC_ENABLE"]
    imports.prepare_program()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_only_a_program_of_its_own_keeps_imports_out_of_collections() -> None:
    frozen = gc.get_freeze_count()
    with imports.quick_imports():
        pass
    assert gc.get_freeze_count() == frozen
    imports.prepare_program()
    try:
        with imports.quick_imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
