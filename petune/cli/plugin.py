"""`petune plugin new` starts a method, dataset or task of your own; `petune plugin check` checks its contract."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petune.cli.help import Command
from petune.cli.options import Json, user_path
from petune.cli.terminal import clean, print_data, print_json

if TYPE_CHECKING:
    from petune.plugin_dev.finding import Finding

plugin = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Start a method, dataset or task of your own, or check one."
)


class Kind(StrEnum):
    """Kind of a plugin."""

    tuner = "tuner"
    dataset = "dataset"
    task = "task"


Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name: lowercase letters, digits, underscores.")]
Registered = Annotated[
    str, typer.Argument(metavar="NAME", help="A registered name, such as vpt, vpt:deep=false, digits or folder:pets.")
]
NewKind = Annotated[Kind, typer.Option("--kind", help="What to write.")]
CheckedKind = Annotated[
    Kind | None,
    typer.Option("--kind", help="What NAME is.  [default: the kind that has this name]", show_default=False),
]
Parent = Annotated[
    Path, typer.Option("--in", metavar="DIR", help="Where to put it.  [default: here]", show_default=False)
]


@dataclass(frozen=True)
class Checked:
    """The findings on one subject.

    Attributes:
        library: The library whose tiny model a tuner was tried on; for others, the kind of plugin.
        refused: Why the method refuses the model; empty if it does not.
        findings: One for each property.
    """

    library: str
    refused: str
    findings: tuple[Finding, ...]


@plugin.command(cls=Command)
def new(name: Name, kind: NewKind = Kind.tuner, parent: Parent = Path()) -> None:
    """Write a package with a working plugin, its test and its entry point."""
    from petune.plugin_dev.scaffold import write_plugin

    parent = user_path(parent)
    for path in write_plugin(name, parent, kind.value):
        print_data(str(path))
    root = parent / f"petune-{name.replace('_', '-')}"
    print_data(f"\npip install -e {shlex.quote(str(root))}\npetune plugin check {name}")


@plugin.command(cls=Command)
def check(name: Registered, kind: CheckedKind = None, json: Json = False) -> None:
    """Check the contract of a plugin; exit code 1 if it is broken.

    A method is tried on tiny models of timm, torchvision and transformers; a dataset is read twice; a task is given
    made-up targets.
    """
    subjects = list(_check(name, kind or _kind_of(name)))
    if json:
        print_json([asdict(subject) for subject in subjects])
    else:
        for subject in subjects:
            _print(subject)
    all_refused = all(subject.refused for subject in subjects)
    if all_refused or any(finding.problem for subject in subjects for finding in subject.findings):
        raise typer.Exit(1)


def _kind_of(text: str) -> Kind:
    """Return the kind of plugin that has this name; a path is a dataset.

    Raises:
        UnknownName: No method, dataset or task has it.
        UsageError: Plugins of several kinds have it.
    """
    from petune.base.entry_points import registered_plugins
    from petune.base.errors import UnknownName, UsageError
    from petune.data.registry import complete_name
    from petune.plugin_dev.scaffold import KINDS

    name = text.partition(":")[0].partition(",")[0]
    if complete_name(text) != text or os.sep in name:
        return Kind.dataset
    names = {kind: {plugin.name for plugin in registered_plugins(group)} for kind, group in KINDS.items()}
    kinds = [kind for kind, known in names.items() if name in known]
    if not kinds:
        hint = "`petune methods` and `petune datasets` list the installed ones"
        raise UnknownName("method, dataset or task", name, set().union(*names.values()), hint)
    if len(kinds) > 1:
        raise UsageError(f"{name} is a {' and a '.join(kinds)}", cli_hint="Name one of them with --kind")
    return Kind(kinds[0])


def _check(name: str, kind: Kind) -> Iterator[Checked]:
    if kind is Kind.tuner:
        yield from _check_tuner(name)
    elif kind is Kind.dataset:
        from petune.plugin_dev.dataset_contract import examine_dataset

        yield Checked(kind.value, "", tuple(examine_dataset(name)))
    else:
        from petune.plugin_dev.task_contract import examine_task

        yield Checked(kind.value, "", tuple(examine_task(name)))


def _check_tuner(method: str) -> Iterator[Checked]:
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


def _print(subject: Checked) -> None:
    print_data(subject.library)
    if subject.refused:
        print_data(clean(f"  refused  {subject.refused}"))
    for finding in subject.findings:
        state, detail = ("BROKEN", f": {finding.problem}") if finding.problem else ("ok", "")
        print_data(clean(f"  {state:7}  {finding.name}{detail}"))
