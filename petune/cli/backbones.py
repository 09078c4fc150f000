"""`petune backbones`: names that --backbone takes."""

from __future__ import annotations

from typing import Annotated

import typer

from petune.cli.options import Json
from petune.cli.terminal import say, show, show_json, show_table

Pattern = Annotated[str | None, typer.Argument(help="List timm's pretrained models that match, as 'vit*dinov2*'.")]


def backbones(pattern: Pattern = None, json: Json = False) -> None:
    """List the names that --backbone takes.

    Without PATTERN the short names, with it timm's.
    """
    if pattern is not None:
        _timm(pattern, json)
        return
    from petune.backbones import ALIASES

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
        show_json(found)
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
    show_table(("name", "timm model", "default weights", "about"), rows)
    say("any timm name works too: petune backbones 'vit*'")


def _timm(pattern: str, as_json: bool) -> None:
    from petune.backbones import list_backbones

    names = list_backbones(pattern if any(c in pattern for c in "*?[") else f"*{pattern}*")
    if as_json:
        show_json(names)
    elif names:
        show("\n".join(names))
    else:
        say(f"timm has no pretrained model that matches {pattern!r}")
