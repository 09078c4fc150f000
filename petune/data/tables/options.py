"""Options that say which columns of a table are what; the same for every reader of tables."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from petune.data.reader import ReaderConfig

SEPARATORS = {"comma": ",", "space": " ", "tab": "\t"}
"""Separators by name: a comma ends an option, and spaces around a value are not part of it."""


def _as_text(value: Any) -> Any:
    """Read a name such as 2020, which YAML reads as a number."""
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _separator(value: Any) -> Any:
    return SEPARATORS.get(value, _as_text(value)) if isinstance(value, str) else _as_text(value)


Name = Annotated[str, BeforeValidator(_as_text)]
Names = Annotated[list[str], BeforeValidator(_as_text), Field(min_length=1)]


class ColumnOptions(ReaderConfig):
    """The columns of a table. At most one of `label`, `labels`, `target` and `mask` is given.

    Attributes:
        image: Column of the images: paths, bytes or arrays. Found by its type or name if not given.
        label: Column of the class.
        labels: Column of several classes, a list or text with a `separator`; or several columns of 0 and 1.
        separator: Text between the classes of a cell of `labels`; also `comma`, `space` and `tab`.
        target: Column of a number, or several columns.
        mask: Column of masks: PNG files, palette or gray, with a class a pixel.
        classes: Names of the classes, in order; for masks also a mapping of values to names. Found if not given.
        first_class: Value of the first class in masks: 1 for Oxford's trimaps.
        ignore: Value of pixels in masks that do not count; None if all count.
        split: Column of `train`, `val` and `test`. Without one, a fifth is cut for testing.
        weight: Column of each image's weight in the loss.
        group: Column of groups (a patient, a video) that are never divided between splits.
        channels_first: Arrays are (channels, height, width); false for (height, width, channels) of any shape. The
            layout of NPY files is read from their shape, and another one is refused.
    """

    text_options: ClassVar[frozenset[str]] = frozenset(
        {"image", "label", "labels", "separator", "target", "mask", "classes", "split", "weight", "group"}
    )
    image: Name | None = None
    label: Name | None = None
    labels: Names | Name | None = None
    separator: Annotated[str, BeforeValidator(_separator), Field(min_length=1)] | None = None
    target: Names | Name | None = None
    mask: Name | None = None
    classes: dict[int, Name] | Names | None = None
    first_class: int = Field(0, ge=0, le=254)
    ignore: int | None = Field(255, ge=0, le=255)
    split: Name | None = None
    weight: Name | None = None
    group: Name | None = None
    channels_first: bool | None = None

    @model_validator(mode="after")
    def _check_combination(self) -> ColumnOptions:
        given = [name for name in ("label", "labels", "target", "mask") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are alternatives. Give one of them")
        if self.separator is not None and given and not isinstance(self.labels, str):
            raise ValueError("separator is only for labels=COLUMN")
        masks = [name for name in ("first_class", "ignore") if name in self.model_fields_set]
        if masks and given and given != ["mask"]:
            raise ValueError(f"{' and '.join(masks)} is only for masks")
        if isinstance(self.classes, dict) and "first_class" in self.model_fields_set:
            raise ValueError("classes already says the value of each class. Leave first_class out")
        names = list(self.classes.values()) if isinstance(self.classes, dict) else self.classes or []
        if len({*names}) < len(names):
            raise ValueError("classes holds a name twice")
        return self
