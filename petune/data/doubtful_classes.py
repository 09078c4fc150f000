"""Class folders that are probably none: folds or domains with the same classes in each, a folder around all classes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from petune.base.errors import DataError
from petune.base.text import shortened
from petune.data.find_images import has_images, visible_subfolders
from petune.data.split_names import parse_split_name

UNLABELED = ("unlabeled", "unlabelled", "unannotated")
MAX_SHOWN = 5


def check_doubtful_classes(path: Path, folders: list[Path]) -> None:
    """Check that the class folders of a folder without splits are no folds, domains or labeled images.

    Args:
        path: The folder.
        folders: Its class folders.

    Raises:
        DataError: Each has the same folders of images in it, or one is of unlabeled images and another has the classes.
    """
    inner = {folder: _image_folders(folder) for folder in folders}
    _check_not_repeated(path, inner)
    unlabeled = [folder.name for folder in folders if folder.name.casefold() in UNLABELED]
    labeled = [folder for folder, names in inner.items() if len(names) > 1 and folder.name not in unlabeled]
    if unlabeled and labeled:
        raise DataError(
            f"{path} has images without labels in {unlabeled[0]}/, which is no class, and folders of images in "
            f"{labeled[0].name}/. If those are the classes, use folder:{labeled[0]}; if not, move {unlabeled[0]} away"
        )


def names_of_splits_note(classes: Iterable[str]) -> str:
    """Name the classes whose folders have a split's name; empty if there are none."""
    parsed = {name: parse_split_name(name) for name in classes}
    named = [f"{name}/" for name, split in parsed.items() if split is not None and split.is_word and split.is_numbered]
    if not named:
        return ""
    kind, verb = ("class folders", "have") if len(named) > 1 else ("class folder", "has")
    return f"{kind} {', '.join(named[:MAX_SHOWN])} {verb} a split's name: if it is no class, move it away"


def _check_not_repeated(path: Path, inner: dict[Path, list[str]]) -> None:
    common = set.intersection(*map(set, inner.values())) if len(inner) > 1 else set()
    if len(common) < 2:
        return
    first, second, *others = inner
    shown = sorted(common)
    raise DataError(
        f"every class folder of {path} has the same folders of images in it: {shortened(shown, MAX_SHOWN)}. "
        f"If those are the classes, use folder:{first} or folder:{second}"
        f"{', …' if others else ''}, or merge the folders of each class; if {first.name} and {second.name} are "
        f"classes, put all class folders into {path / 'train'}"
    )


def _image_folders(folder: Path) -> list[str]:
    """Return the names of the folders with images in a folder; empty if it has images of its own."""
    subfolders = visible_subfolders(folder)
    if len(subfolders) < 2 or has_images(folder, below=False):
        return []
    return [subfolder.name for subfolder in subfolders if has_images(subfolder)]
