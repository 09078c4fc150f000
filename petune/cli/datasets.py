"""`petune datasets`: the names that --dataset takes, and whether their files are here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petune.cli.options import Json, user_path
from petune.cli.terminal import print_json, print_table

DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Directory that holds CIFAR.  [default: $PETUNE_DATA, then the cache]", show_default=False
    ),
]


def datasets(data_dir: DataDir = None, json: Json = False) -> None:
    """List the names that --dataset takes, and where their files are."""
    from petune.data import DATASETS
    from petune.data.lookup import find_dataset

    directory = user_path(data_dir) if data_dir else None
    rows = [{"name": name, "about": about, "found": find_dataset(name, directory)} for name, about in DATASETS.items()]
    columns = ("name", "about", "found")
    if json:
        print_json(rows)
    else:
        print_table(columns, [[str(row[key] or "-") for key in columns] for row in rows])
