"""`petune push`: upload an adapter to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from petune.cli.options import Json, Source
from petune.cli.terminal import clean, print_data, print_json, print_status, print_table

if TYPE_CHECKING:
    from petune.serving.hub_push import PushPreview

Repo = Annotated[str, typer.Argument(metavar="REPO", help="user/name on the Hugging Face Hub.")]
Private = Annotated[bool, typer.Option("--private", help="Make the new repository private.")]
Update = Annotated[bool, typer.Option("--update", help="Add a commit to an existing repository.")]


DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and print the files and the model card; upload nothing.")
]


def push(
    source: Source,
    repo: Repo,
    private: Private = False,
    update: Update = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Upload an adapter and its model card to the Hugging Face Hub.

    A new repository is created unless --update is given.

    The token comes from HF_TOKEN or `hf auth login`. HF_ENDPOINT and HF_HUB_OFFLINE are respected.
    --dry-run needs neither a token nor the network.
    """
    from petune.base.text import format_size
    from petune.serving.hub_push import preview_push, push

    if dry_run:
        _print_preview(preview_push(source, repo, update=update), as_json=json)
        return
    pushed = push(source, repo, private=private, update=update)
    if json:
        print_json(asdict(pushed))
        return
    print_data(clean(f"{pushed.url}  {format_size(pushed.bytes)}"))
    print_status(clean(f"download it with: petune pull {pushed.repo}"))


def _print_preview(preview: PushPreview, *, as_json: bool) -> None:
    """Print the files that would be uploaded, and the model card."""
    from petune.base.text import format_size

    if as_json:
        print_json(asdict(preview))
        return
    rows = [[name, format_size(size)] for name, size in preview.files.items()]
    print_table(("file", "size"), rows, right=("size",))
    print_data("\n" + "\n".join(map(clean, preview.card.splitlines())))
    print_status(clean(f"dry run: nothing was uploaded to {preview.repo}"))
