"""`petune backbones`: the names that --backbone takes."""

from __future__ import annotations

from typing import Annotated

import typer

from petune.cli.options import Json
from petune.cli.terminal import print_data, print_json, print_status, print_table

COLUMNS = ("name", "timm model", "default weights", "about")
Pattern = Annotated[
    str | None, typer.Argument(metavar="PATTERN", help="Search timm's pretrained models too, e.g. 'vit*dinov2*'.")
]


def backbones(pattern: Pattern = None, json: Json = False) -> None:
    """List the names that --backbone takes.

    Without PATTERN only petune's short names are listed.
    """
    if pattern is None:
        _list_short_names(json)
    else:
        _list_matching(pattern, json)


def _list_short_names(as_json: bool) -> None:
    from petune.backbones.names import ALIASES

    if as_json:
        keys = ("timm_name", "options", "default_weights", "about")
        print_json([{"name": name} | {key: getattr(alias, key) for key in keys} for name, alias in ALIASES.items()])
        return
    rows = []
    for name, alias in ALIASES.items():
        options = "".join(f",{key}={value}" for key, value in alias.options.items())
        rows.append((name, alias.timm_name + options, alias.default_weights or "-", alias.about))
    print_table(COLUMNS, rows, optional=COLUMNS[1:3])
    print_status("any timm name works too: petune backbones 'vit*'")


def _list_matching(pattern: str, as_json: bool) -> None:
    from petune.backbones.names import list_backbones

    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    names = list_backbones(glob)
    if as_json:
        print_json(names)
    elif names:
        print_data("\n".join(names))
    else:
        print_status(f"no short name or pretrained timm model matches {pattern!r}")
