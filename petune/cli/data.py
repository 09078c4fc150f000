"""`petune data check`: look through a folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petune.cli.options import Json, user_path
from petune.cli.terminal import clean, show, show_json, show_table

data = typer.Typer(help="Look after pictures.", no_args_is_help=True, rich_markup_mode=None)


@data.callback()
def _group() -> None:
    """Look after pictures."""


@data.command()
def check(folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)], json: Json = False) -> None:
    """Decode every picture of a folder dataset; exit code 4 if any is broken or stands in two splits."""
    from petune.data.check import check_folder
    from petune.data.layout import unread

    report = check_folder(user_path(folder))
    if json:
        shared = [[str(a), str(b)] for a, b in report.shared]
        show_json({"pictures": report.pictures, "broken": report.broken, "shared": shared, "left_out": report.left_out})
    else:
        parts = tuple(report.pictures)
        names = report.pictures[parts[0]]
        rows = [[name, *[str(report.pictures[part][name]) for part in parts]] for name in names]
        show_table(("class", *parts), rows, right=parts)
        for message in report.broken:
            show(clean(message))
        for file, twin in report.shared:
            show(clean(f"{file} is the same file as {twin}, in another split"))
        if said := unread(report.left_out):
            show(clean(said))
        show(
            "no fault found" if report.is_sound else f"{len(report.broken)} broken, {len(report.shared)} in two splits"
        )
    if not report.is_sound:
        raise typer.Exit(4)
