"""`petune datasets`: names that --dataset takes, and whether their images are here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petune.cli.options import Json, user_path
from petune.cli.terminal import print_json, print_table

DataDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where CIFAR lies.  [default: $PETUNE_DATA, then the cache]", show_default=False),
]


def datasets(data_dir: DataDir = None, json: Json = False) -> None:
    """List the names that --dataset takes, and what is here."""
    from petune.data import DATASETS
    from petune.data.lookup import find_dataset

    place = user_path(data_dir) if data_dir else None
    found = [{"name": name, "about": about, "found": find_dataset(name, place)} for name, about in DATASETS.items()]
    columns = ("name", "about", "found")
    if json:
        print_json(found)
    else:
        print_table(columns, [[str(d[key] or "-") for key in columns] for d in found])
