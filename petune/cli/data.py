"""`petune data check`: check a folder of images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petune.base.text import plural
from petune.cli.help import Command
from petune.cli.options import Json, user_path
from petune.cli.terminal import clean, print_data, print_json, print_table

if TYPE_CHECKING:
    from petune.data.check import FolderReport

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder with a directory for each class, or with train/, val/ and test/.")
]

data = typer.Typer(help="Check a folder of images.", no_args_is_help=True, rich_markup_mode=None)


@data.callback()
def _group() -> None:
    """Check a folder of images."""


@data.command(cls=Command)
def check(folder: Folder, json: Json = False) -> None:
    """Decode every image of a folder dataset; exit code 4 if any is broken or in two splits or classes."""
    from petune.data.check import check_folder

    report = check_folder(user_path(folder))
    if json:
        print_json(_plain(report))
    else:
        _show(report)
    if not report.is_sound:
        raise typer.Exit(4)


def _plain(report: FolderReport) -> dict[str, Any]:
    plain = asdict(report)
    for key in ("in_two_splits", "in_two_classes"):
        plain[key] = [[str(file), str(twin)] for file, twin in plain[key]]
    return plain


def _show(report: FolderReport) -> None:
    from petune.data.find_images import unsupported_note

    splits = tuple(report.images)
    names = report.images[splits[0]]
    print_table(
        ("class", *splits),
        [[name, *[str(report.images[part][name]) for part in splits]] for name in names],
        right=splits,
    )
    messages = [
        *report.broken,
        *(f"{file} is the same file as {twin}, in another split" for file, twin in report.in_two_splits),
        *(f"{file} is the same file as {twin}, in another class" for file, twin in report.in_two_classes),
    ]
    if report.copies:
        messages.append(
            f"{plural(report.copies, 'copy', 'copies')} within a class; cutting a split keeps copies together"
        )
    for part, classes in (("test", report.too_few_for_test), ("val", report.too_few_for_val)):
        if classes:
            messages.append(f"too few different images for a {part} split: {', '.join(classes)}")
    messages += [unsupported_note(report.skipped), report.left_out]
    for message in filter(None, messages):
        print_data(clean(message))
    print_data(_summary(report))


def _summary(report: FolderReport) -> str:
    if report.is_sound:
        return "no problems found"
    return (
        f"{len(report.broken)} broken, {len(report.in_two_splits)} in two splits, "
        f"{len(report.in_two_classes)} in two classes"
    )
