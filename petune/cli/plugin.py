"""`petune plugin new` starts a method of your own, `petune plugin check` checks that a method meets the contract."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petune.cli.help import Command
from petune.cli.options import Json, user_path
from petune.cli.terminal import clean, print_data, print_json

if TYPE_CHECKING:
    from petune.plugin_dev.contract import Finding

plugin = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Start a method of your own, or check one.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The method's name: lowercase letters, digits, underscores.")]
Method = Annotated[str, typer.Argument(metavar="METHOD", help="A registered method, such as vpt or vpt:deep=false.")]
Parent = Annotated[
    Path, typer.Option("--in", metavar="DIR", help="Where to put it.  [default: here]", show_default=False)
]


@dataclass(frozen=True)
class CheckedModel:
    """The findings on one library's tiny model.

    Attributes:
        library: The library.
        refused: Why the method refuses the model; empty if it does not.
        findings: One for each property.
    """

    library: str
    refused: str
    findings: tuple[Finding, ...]


@plugin.command(cls=Command)
def new(name: Name, parent: Parent = Path()) -> None:
    """Write a package with a working method, its test and its entry point."""
    from petune.plugin_dev.scaffold import write_plugin

    parent = user_path(parent)
    for path in write_plugin(name, parent):
        print_data(str(path))
    root = parent / f"petune-{name.replace('_', '-')}"
    print_data(f"\npip install -e {shlex.quote(str(root))}\npetune plugin check {name}")


@plugin.command(cls=Command)
def check(method: Method, json: Json = False) -> None:
    """Check the contract on tiny models of timm, torchvision and transformers; exit code 1 if it is broken."""
    models = list(_check(method))
    if json:
        print_json([asdict(model) for model in models])
    else:
        for model in models:
            _print(model)
    all_refused = all(model.refused for model in models)
    if all_refused or any(finding.problem for model in models for finding in model.findings):
        raise typer.Exit(1)


def _check(method: str) -> Iterator[CheckedModel]:
    from petune.base.errors import AttachError
    from petune.injector.registry import parse_method
    from petune.plugin_dev.contract import examine
    from petune.plugin_dev.tiny_models import tiny_models

    name, options = parse_method(method)
    for library, build in tiny_models().items():
        try:
            yield CheckedModel(library, "", tuple(examine(name, build(), **options)))
        except AttachError as error:
            yield CheckedModel(library, str(error), ())


def _print(model: CheckedModel) -> None:
    print_data(model.library)
    if model.refused:
        print_data(clean(f"  refused  {model.refused}"))
    for finding in model.findings:
        state, detail = ("BROKEN", f": {finding.problem}") if finding.problem else ("ok", "")
        print_data(clean(f"  {state:7}  {finding.name}{detail}"))
