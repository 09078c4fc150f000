"""`petune pull`: download an adapter from the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from petune.cli.options import Json, TrustRemoteCode
from petune.cli.push import Repo
from petune.cli.terminal import clean, one_line, print_data, print_json, print_status

Output = Annotated[
    Path | None,
    typer.Argument(metavar="DIR", help="Directory to create.  [default: the repository's name, in this directory]"),
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit.  [default: the newest commit]")
]


def pull(
    repo: Repo,
    output: Output = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Download an adapter from the Hugging Face Hub.

    The files are checked before the directory is created.
    """
    from petune.base.text import format_size
    from petune.serving.hub_pull import pull

    pulled = pull(repo, output, revision=revision, trust_remote_code=trust_remote_code)
    if json:
        print_json(asdict(pulled))
        return
    print_data(clean(f"{pulled.output}  {format_size(pulled.bytes)}"))
    print_status(clean(f"{one_line(pulled.method)} on {one_line(pulled.backbone)}, commit {pulled.commit[:12]}"))
