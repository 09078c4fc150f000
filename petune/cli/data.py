"""`petune data check`: look through a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petune.cli.options import Json, user_path
from petune.cli.terminal import clean, print_data, print_json, print_table

data = typer.Typer(help="Look after images.", no_args_is_help=True, rich_markup_mode=None)


@data.callback()
def _group() -> None:
    """Look after images."""


@data.command()
def check(folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)], json: Json = False) -> None:
    """Decode every image of a folder dataset; exit code 4 if any is broken or in two splits or classes."""
    from petune.data.check import check_folder
    from petune.data.layout import unread

    report = check_folder(user_path(folder))
    if json:
        pairs = {"shared": report.shared, "doubtful": report.doubtful}
        found = {what: [[str(a), str(b)] for a, b in several] for what, several in pairs.items()}
        print_json({"images": report.images, "broken": report.broken, **found, "untested": report.untested,
                   "unvalidated": report.unvalidated, "copies": report.copies,
                   "left_out": report.left_out})  # fmt: skip
    else:
        parts = tuple(report.images)
        names = report.images[parts[0]]
        rows = [[name, *[str(report.images[part][name]) for part in parts]] for name in names]
        print_table(("class", *parts), rows, right=parts)
        for message in report.broken:
            print_data(clean(message))
        for file, twin in report.shared:
            print_data(clean(f"{file} is the same file as {twin}, in another split"))
        for file, twin in report.doubtful:
            print_data(clean(f"{file} is the same file as {twin}, in another class"))
        if report.copies:
            print_data(f"{report.copies} copies in the same class; a split that is cut never parts them")
        for split, lacking in (("test", report.untested), ("val", report.unvalidated)):
            if lacking:
                print_data(clean(f"too few different images to give the {split} split one: {', '.join(lacking)}"))
        if said := unread(report.left_out):
            print_data(clean(said))
        counts = ((report.broken, "broken"), (report.shared, "in two splits"), (report.doubtful, "in two classes"))
        print_data("no fault found" if report.is_sound else ", ".join(f"{len(found)} {what}" for found, what in counts))
    if not report.is_sound:
        raise typer.Exit(4)
