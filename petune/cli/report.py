"""`petune report`: one HTML page from run, compare, sweep and pretrain directories."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from petune.cli.options import Json, user_path
from petune.cli.terminal import clean, print_data, print_json, print_status

Directories = Annotated[
    list[Path], typer.Argument(metavar="DIR", help="Directories of runs, comparisons, sweeps or pretrainings.")
]
Output = Annotated[
    Path, typer.Option("--output", metavar="FILE", help="File to write; an older report is replaced, no other file.")
]


def report(directories: Directories, output: Output = Path("report.html"), json: Json = False) -> None:
    """Write one HTML page about everything in DIR…, subdirectories included.

    The page has tables, charts and the provenance of all numbers. It contains no scripts and loads nothing.
    """
    from petune.base.text import format_size
    from petune.runner.report.page import write_page

    page = write_page([user_path(directory) for directory in directories], user_path(output))
    if json:
        print_json(asdict(page))
        return
    print_data(clean(f"{page.output}  {format_size(page.bytes)}"))
    print_status(f"directories: {page.done} finished, {page.unfinished} unfinished, {page.broken} broken")
