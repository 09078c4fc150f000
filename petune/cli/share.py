"""`petune push` and `petune pull`: adapters on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from petune.cli.options import Json, TrustCode
from petune.cli.terminal import clean, one_line, print_data, print_json, print_status

Source = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory, or an adapter directory.")]
Repo = Annotated[str, typer.Argument(metavar="REPO", help="user/name on the Hugging Face Hub.")]
Output = Annotated[
    Path | None, typer.Argument(metavar="DIR", help="Where to put it.  [default: the repository's name, here]")
]
Private = Annotated[bool, typer.Option("--private", help="The new repository is only for those you let in.")]
Update = Annotated[bool, typer.Option("--update", help="Add a commit to a repository that exists.")]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="NAME", help="A branch, tag or commit.  [default: the newest]")
]


def push(source: Source, repo: Repo, private: Private = False, update: Update = False, json: Json = False) -> None:
    """Put an adapter and its card on the Hugging Face Hub.

    In a new repository, unless --update is given.

    HF_TOKEN or `hf auth login` gives the token, HF_ENDPOINT another hub; HF_HUB_OFFLINE is honoured.
    """
    from petune.base.text import format_size
    from petune.serving.share import push

    done = push(source, repo, private=private, update=update)
    if json:
        print_json(asdict(done))
        return
    print_data(clean(f"{done.url}  {format_size(done.bytes)}"))
    print_status(clean(f"others get it with: petune pull {done.repo}"))


def pull(
    repo: Repo,
    output: Output = None,
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    json: Json = False,
) -> None:
    """Fetch an adapter from the Hugging Face Hub.

    It is read and checked before it is put in its place.
    """
    from petune.base.text import format_size
    from petune.serving.share import pull

    done = pull(repo, output, revision=revision, trust_remote_code=trust_remote_code)
    if json:
        print_json(asdict(done))
        return
    print_data(clean(f"{done.output}  {format_size(done.bytes)}"))
    print_status(clean(f"{one_line(done.method)} on {one_line(done.backbone)}, commit {done.commit[:12]}"))
