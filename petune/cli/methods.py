"""`petune methods`: every registered tuner, the broken ones too. Nothing is imported to list them."""

from __future__ import annotations

from typing import Annotated

import typer

from petune.cli.options import Json
from petune.cli.terminal import clean, print_json, print_table

Load = Annotated[bool, typer.Option("--load", help="Import each one, so that a broken one shows its cause.")]


def methods(json: Json = False, load: Load = False) -> None:
    """List the installed methods, broken ones too."""
    from petune.injector.registry import check_loads, list_tuners

    found = [
        {
            "name": t.name,
            "distribution": t.distribution,
            "version": t.version,
            "state": check_loads(t) if load else t.state,
        }
        for t in list_tuners()
    ]
    if json:
        print_json(found)
        return
    columns = ("name", "distribution", "version", "state")
    print_table(columns, [[clean(str(t[c] or "-")) for c in columns] for t in found])
