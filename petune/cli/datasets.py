"""`petune datasets`: the names that --dataset takes, and whether their files are here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from petune.cli.options import DataDir, Json, user_path
from petune.cli.terminal import clean, print_json, print_table

if TYPE_CHECKING:
    from petune.data.registry import DatasetRecord


Name = Annotated[
    str | None,
    typer.Argument(metavar="[NAME]", help="List what this one takes after its colon, such as torchvision's datasets."),
]


def datasets(name: Name = None, data_dir: DataDir = None, json: Json = False) -> None:
    """List the names that --dataset takes: what each is, what it needs, and where its files are."""
    from petune.data.registry import list_datasets

    directory = user_path(data_dir) if data_dir else None
    if name is not None:
        _print_arguments(name, directory, json=json)
        return
    rows = [_row(record, directory) for record in list_datasets()]
    if json:
        print_json(rows)
        return
    columns = ["name", "about", "needs", "found", "package", "state"]
    if all(row["state"] == "ok" for row in rows):
        columns.remove("state")
    if all(row["distribution"] == "petune" for row in rows):
        columns.remove("package")
    cells = [{**row, "name": row["usage"], "package": f"{row['distribution']} {row['version']}"} for row in rows]
    table = [[clean(str(row[key] or "-")) for key in columns] for row in cells]
    print_table(columns, table, optional=["package", "needs"])


def _print_arguments(name: str, directory: Path | None, *, json: bool) -> None:
    from petune.base.errors import UsageError
    from petune.data.lookup import find_dataset
    from petune.data.registry import list_arguments

    rows = [
        {"name": f"{name}:{argument}", "about": about, "found": find_dataset(f"{name}:{argument}", directory)}
        for argument, about in list_arguments(name).items()
    ]
    if not rows:
        raise UsageError(f"{name} has no list of names. `petune datasets` says what it takes")
    if json:
        print_json(rows)
        return
    columns = ["name", "about", "found"]
    print_table(columns, [[clean(str(row[key] or "-")) for key in columns] for row in rows], optional=["found"])


def _row(record: DatasetRecord, directory: Path | None) -> dict[str, Any]:
    from dataclasses import asdict

    from petune.base.errors import PetuneError
    from petune.data.lookup import find_dataset

    row = {**asdict(record), "usage": record.usage, "found": None}
    if record.state == "ok" and not record.argument:
        try:
            row["found"] = find_dataset(record.name, directory)
        except PetuneError as error:
            row["state"] = str(error)
    return row
