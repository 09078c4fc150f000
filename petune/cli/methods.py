"""`petune methods`: list every registered tuner, broken ones too. Nothing is imported to list them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from petune.cli.options import Json
from petune.cli.terminal import clean, print_json, print_table

if TYPE_CHECKING:
    from petune.base.plugins import PluginRecord

Load = Annotated[bool, typer.Option("--load", help="Import each method, so that a broken one shows its error.")]


def methods(json: Json = False, load: Load = False) -> None:
    """List the installed methods: what each does, what it trains, its paper and its package."""
    from petune.injector.registry import list_tuners

    rows = [_row(record, load) for record in list_tuners()]
    if json:
        print_json(rows)
        return
    cells = [[clean(cell) for cell in _cells(row)] for row in rows]
    columns = ["method", "what it does", "trains", "paper", "package", "state"]
    if all(row["state"] == "ok" for row in rows):
        columns.remove("state")
    print_table(columns, [row[: len(columns)] for row in cells], optional=["trains", "package", "paper"])


def _row(record: PluginRecord, load: bool) -> dict[str, Any]:
    from dataclasses import asdict

    from petune.injector.describe import describe_tuner
    from petune.injector.registry import check_loads

    return {
        "name": record.name,
        **asdict(describe_tuner(record)),
        "distribution": record.distribution,
        "version": record.version,
        "state": check_loads(record) if load else record.state,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    paper = f"arXiv:{row['arxiv']}" if row["arxiv"] else ""
    package = f"{row['distribution']} {row['version']}"
    return [row["name"], row["summary"] or "-", row["trains"] or "-", paper or "-", package, row["state"]]
