"""`petune backbones`: names that --backbone takes."""

from __future__ import annotations

from typing import Annotated

import typer

from petune.cli.options import Json
from petune.cli.terminal import print_data, print_json, print_status, print_table

Pattern = Annotated[str | None, typer.Argument(metavar="PATTERN", help="List what matches, as 'vit*dinov2*'.")]


def backbones(pattern: Pattern = None, json: Json = False) -> None:
    """List the names that --backbone takes.

    Without PATTERN the short names; with it those that match, and timm's pretrained models.
    """
    if pattern is not None:
        _matching(pattern, json)
        return
    from petune.backbones.create import ALIASES

    if json:
        found = [
            {
                "name": name,
                "timm_name": alias.timm_name,
                "options": alias.options,
                "default_weights": alias.default_weights,
                "about": alias.about,
            }
            for name, alias in ALIASES.items()
        ]
        print_json(found)
        return
    rows = [
        (
            name,
            alias.timm_name + "".join(f",{k}={v}" for k, v in alias.options.items()),
            alias.default_weights,
            alias.about,
        )
        for name, alias in ALIASES.items()
    ]
    columns = ("name", "timm model", "default weights", "about")
    print_table(columns, rows, optional=columns[1:3])  # those have no words to break a line between
    print_status("any timm name works too: petune backbones 'vit*'")


def _matching(pattern: str, as_json: bool) -> None:
    from petune.backbones.create import list_backbones

    wanted = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    names = list_backbones(wanted)
    if as_json:
        print_json(names)
    elif names:
        print_data("\n".join(names))
    else:
        print_status(f"no short name and no pretrained model of timm matches {pattern!r}")
