"""Decide which columns hold the images and the targets, by option, by type or by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from petune.base.errors import DataError
from petune.data.images import UNSUPPORTED_SUFFIXES, supported_suffixes
from petune.data.tables.options import ColumnOptions
from petune.data.tables.table import ColumnType, Table, check_column, listed
from petune.data.target import TargetKind
from petune.data.video.decode import VIDEO_SUFFIXES

IMAGE_NAMES = (
    "image", "img", "image_path", "img_path", "file_name", "filename", "filepath", "file", "path", "pixels", "video",
    "video_path", "clip",
)  # fmt: skip
"""Usual names of a column of images or videos, best first."""
KIND_OF_OPTION: dict[str, TargetKind] = {"label": "class", "labels": "multi_hot", "target": "number", "mask": "mask"}
USUAL_NAMES = {"cls": "label"}
"""Names of targets that are used elsewhere: webdataset's `cls`."""
MAX_LOOKED_AT = 50
"""Values that are looked at to tell a column of paths."""


@dataclass(frozen=True)
class TargetColumns:
    """The columns of the targets.

    Attributes:
        kind: Kind of the targets.
        columns: One column, or several of `labels` or `target`.
        is_one_per_class: `labels` names a column of 0 and 1 for each class.
    """

    kind: TargetKind
    columns: tuple[str, ...]
    is_one_per_class: bool = False


def image_column(table: Table, options: ColumnOptions) -> str:
    """Return the column of the images.

    Raises:
        DataError: The option names no column, or it is not clear which one it is.
    """
    if options.image is not None:
        return check_column(table, options.image, "image")
    taken = {*_named(options)}
    candidates = [c for c in table.columns if c not in taken and table.type_of(c).kind == "image"]
    if not candidates:
        candidates = [c for c in table.columns if c not in taken and _holds_paths(table, c)]
    if not candidates:  # paths without a suffix, or text that is not a path: decoding says what is wrong
        candidates = [c for c in table.columns if c not in taken and c.casefold() in IMAGE_NAMES[:2]]
    if len(candidates) > 1:
        others = [c for c in candidates if not c.casefold().startswith(("mask", "seg", "annotation"))]
        candidates = sorted(others, key=_rank)
        if len(candidates) > 1 and _rank(candidates[0]) == _rank(candidates[1]):
            raise DataError(
                f"{table.title} has several columns of images: {listed(candidates)}. Choose one: image={candidates[0]}"
            )
    if not candidates:
        raise DataError(
            f"{table.title} has no column of images. Columns: {listed(table.columns)}. Name it: image=COLUMN, with "
            "paths relative to the table, bytes or arrays"
        )
    return candidates[0]


def target_columns(table: Table, options: ColumnOptions, image: str) -> TargetColumns:
    """Return the columns of the targets.

    Args:
        table: The rows.
        options: See `ColumnOptions`.
        image: The column of the images.

    Raises:
        DataError: An option names no column, or it is not clear which column it is.
    """
    for option, kind in KIND_OF_OPTION.items():
        value: str | list[str] | None = getattr(options, option)
        if value is not None:
            columns = tuple(value) if isinstance(value, list) else (value,)
            for column in columns:
                check_column(table, column, option)
            if len({*columns, image}) <= len(columns):
                raise DataError(f"{option} names a column twice, or that of the images: {listed([*columns, image])}")
            return TargetColumns(kind, columns, kind == "multi_hot" and isinstance(value, list))
    taken = {image, *_named(options)}
    options_of = {c: _likely_option(c, table.type_of(c)) for c in table.columns if c not in taken}
    likely = {column: option for column, option in options_of.items() if option}
    if not likely and len(options_of) == 1:  # a single column of numbers next to the images
        likely = {column: "target" for column in options_of if table.type_of(column).kind == "float"}
    if len(likely) > 1:
        named = {c: option for c, option in likely.items() if c.casefold() in KIND_OF_OPTION}
        no_images = {c: option for c, option in likely.items() if table.type_of(c).kind != "image"}
        likely = next((chosen for chosen in (named, no_images) if len(chosen) == 1), likely)
    if len(likely) != 1:
        raise DataError(_unclear_target(table, likely))
    ((column, likely_option),) = likely.items()
    return TargetColumns(KIND_OF_OPTION[likely_option], (column,))


def _named(options: ColumnOptions) -> list[str]:
    """Return the columns that other options name."""
    names: list[str] = []
    for option in (*KIND_OF_OPTION, "split", "weight", "group"):
        value = getattr(options, option)
        names += value if isinstance(value, list) else [value] if value is not None else []
    return names


def _holds_paths(table: Table, column: str) -> bool:
    if table.type_of(column).kind != "text":
        return False
    values = [value for value in table.values(column)[:MAX_LOOKED_AT] if value]
    suffixes = supported_suffixes() | UNSUPPORTED_SUFFIXES | VIDEO_SUFFIXES | {".npy"}
    return bool(values) and all(Path(value).suffix.lower() in suffixes for value in values)


def _rank(column: str) -> int:
    name = column.casefold()
    return IMAGE_NAMES.index(name) if name in IMAGE_NAMES else len(IMAGE_NAMES)


def _likely_option(column: str, column_type: ColumnType) -> str | None:
    """Return the option that a column is for, by its name and type; None if neither says so."""
    name, kind = USUAL_NAMES.get(column.casefold(), column.casefold()), column_type.kind
    is_named = name in KIND_OF_OPTION
    if column_type.names is not None or (is_named and kind == "list"):
        return "labels" if kind == "list" else "label"
    if kind == "image":
        return "mask"
    if name == "label" and kind == "float":
        return "target"
    return name if is_named else None


def _unclear_target(table: Table, likely: dict[str, str]) -> str:
    if likely:
        column, option = next(iter(likely.items()))
        return (
            f"{table.title} has several columns of targets: {listed(list(likely))}. Choose one, such as "
            f"{option}={column}"
        )
    return (
        f"{table.title} has no column called label, labels, target or mask. Columns: {listed(table.columns)}. Name it: "
        "label=COLUMN for a class, labels= for several, target= for a number, mask= for masks"
    )
