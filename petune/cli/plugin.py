"""`petune plugin new|check`: begin a method of your own, and prove that one keeps the contract."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petune.cli.options import Json, user_path
from petune.cli.terminal import clean, print_data, print_json

if TYPE_CHECKING:
    from petune.plugin_dev.contract import Finding

plugin = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Begin a method of your own, or check one.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The method's name: small letters, digits, underscores.")]
Method = Annotated[str, typer.Argument(metavar="METHOD", help="A registered method, options in place.")]
Place = Annotated[
    Path, typer.Option("--in", metavar="DIR", help="Where to put it.  [default: here]", show_default=False)
]


@dataclass(frozen=True)
class Checked:
    """What the contract says of a method on one library's tiny model."""

    library: str
    refused: str
    findings: tuple[Finding, ...]


@plugin.command()
def new(name: Name, place: Place = Path()) -> None:
    """Write a package with a working method, its test and its entry point."""
    from petune.plugin_dev.scaffold import write_plugin

    place = user_path(place)
    for path in write_plugin(name, place):
        print_data(str(path))
    root = place / f"petune-{name.replace('_', '-')}"
    print_data(f"\npip install -e {shlex.quote(str(root))}\npetune plugin check {name}")


@plugin.command()
def check(method: Method, json: Json = False) -> None:
    """Check the contract on tiny models of timm, torchvision and transformers; exit code 1 if it is broken."""
    checked = list(_check(method))
    if json:
        print_json([asdict(one) for one in checked])
    else:
        for one in checked:
            _show(one)
    proven = any(not one.refused for one in checked)
    if not proven or any(finding.problem for one in checked for finding in one.findings):
        raise typer.Exit(1)


def _check(method: str) -> Iterator[Checked]:
    from petune.base.errors import AttachError
    from petune.injector.registry import parse_method
    from petune.plugin_dev.contract import examine
    from petune.plugin_dev.tiny_models import tiny_models

    name, options = parse_method(method)
    for library, build in tiny_models().items():
        try:
            yield Checked(library, "", tuple(examine(name, build(), **options)))
        except AttachError as error:
            yield Checked(library, str(error), ())


def _show(one: Checked) -> None:
    print_data(one.library)
    if one.refused:
        print_data(clean(f"  refused  {one.refused}"))
    for finding in one.findings:
        state, words = ("BROKEN", f": {finding.problem}") if finding.problem else ("ok", "")
        print_data(clean(f"  {state:7}  {finding.name}{words}"))
