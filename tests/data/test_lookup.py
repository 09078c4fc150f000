"""Finding a dataset and its number of classes without decoding an image."""

from __future__ import annotations

from pathlib import Path

import pytest

from petune.base.errors import DataError, UnknownName
from petune.data.lookup import count_classes, find_dataset


def test_classes_of_named_datasets() -> None:
    assert {name: count_classes(name) for name in ("cifar10", "cifar100", "digits")} == {
        "cifar10": 10,
        "cifar100": 100,
        "digits": 10,
    }
    with pytest.raises(UnknownName, match="digits"):
        count_classes("digit")


@pytest.mark.parametrize("above", ["", "train"])
def test_classes_of_a_folder(above: str, tmp_path: Path) -> None:
    for name in ("cat", "dog", ".hidden"):
        (tmp_path / above / name).mkdir(parents=True)
    assert count_classes(f"folder:{tmp_path}") == 2


def test_a_folder_needs_two_classes(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="at least two"):
        count_classes(f"folder:{tmp_path}")


def test_where_a_dataset_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PETUNE_DATA", raising=False)
    assert (find_dataset("digits"), find_dataset("cifar10"), find_dataset("folder:x")) == (
        "scikit-learn",
        None,
        None,
    )
    archive = tmp_path / "data" / "cifar-100-python.tar.gz"
    archive.parent.mkdir()
    archive.touch()
    assert find_dataset("cifar100", archive.parent) == str(archive)
    monkeypatch.setenv("PETUNE_DATA", str(archive.parent))
    assert find_dataset("cifar100") == str(archive)
