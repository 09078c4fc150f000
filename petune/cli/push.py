"""`petune push`: upload an adapter to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from petune.cli.options import Json, Source
from petune.cli.terminal import clean, print_data, print_json, print_status

Repo = Annotated[str, typer.Argument(metavar="REPO", help="user/name on the Hugging Face Hub.")]
Private = Annotated[bool, typer.Option("--private", help="Make the new repository private.")]
Update = Annotated[bool, typer.Option("--update", help="Add a commit to an existing repository.")]


def push(source: Source, repo: Repo, private: Private = False, update: Update = False, json: Json = False) -> None:
    """Upload an adapter and its model card to the Hugging Face Hub.

    A new repository is created unless --update is given.

    The token comes from HF_TOKEN or `hf auth login`. HF_ENDPOINT and HF_HUB_OFFLINE are respected.
    """
    from petune.base.text import format_size
    from petune.serving.hub_push import push

    pushed = push(source, repo, private=private, update=update)
    if json:
        print_json(asdict(pushed))
        return
    print_data(clean(f"{pushed.url}  {format_size(pushed.bytes)}"))
    print_status(clean(f"download it with: petune pull {pushed.repo}"))
