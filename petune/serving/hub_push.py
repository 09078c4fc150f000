"""Push an adapter directory to the Hugging Face Hub."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

from petune.adapters.card import public_metadata
from petune.adapters.format import CARD_FILE, CONFIG_FILE, TENSOR_FILE, read_adapter
from petune.adapters.peft_format import petune_part
from petune.base.arguments import PathText, check_arguments
from petune.base.errors import HubError, UsageError
from petune.base.files import MANIFEST, manifest_bytes
from petune.base.hub import hub_url
from petune.runner.run_adapter import find_adapter
from petune.serving.hub_client import HubClient, check_repo_name

COMMIT_TIMEOUT_S = 30.0  # longer than for other calls: after a timeout nobody knows whether the commit was made


@dataclass(frozen=True)
class Pushed:
    """Result of a push.

    Attributes:
        repo: Full name of the repository.
        url: Its address.
        commit: The new commit.
        bytes: Size of the files.
        new: True if the repository was created.
    """

    repo: str
    url: str
    commit: str
    bytes: int
    new: bool


@dataclass(frozen=True)
class PushPreview:
    """Files and card that a push would upload.

    Attributes:
        repo: The repository, as given.
        files: Size of each file in bytes.
        card: The model card; empty if the directory has none.
    """

    repo: str
    files: dict[str, int]
    card: str


def preview_push(path: str | Path, repo: str, *, update: bool = False) -> PushPreview:
    """Return what `push` would upload, without the network and without a token; arguments are those of `push`.

    Raises:
        CheckpointError: `path` has no valid adapter.
        UsageError: `repo` is not a valid name.
    """
    files = _checked_files(path, repo, update=update)
    sizes = {name: len(content) for name, content in files.items()}
    return PushPreview(repo, sizes, files.get(CARD_FILE, b"").decode(errors="replace"))


def push(path: str | Path, repo: str, *, private: bool = False, update: bool = False) -> Pushed:
    """Push an adapter directory to a repository of the Hugging Face Hub.

    Args:
        path: A run directory, or an adapter directory.
        repo: `user/name`; without the user, a new repository is made in the account of the token.
        private: Make the new repository private.
        update: Add a commit to an existing repository; otherwise a new one is created.

    Raises:
        CheckpointError: `path` has no valid adapter.
        UsageError: `repo` is not a valid name.
        HubError: The hub cannot be reached or refuses, there is no token, or the repository exists (with `update`:
            does not exist).
    """
    check_arguments(
        "petune.push", path=(path, PathText), repo=(repo, str), private=(private, bool), update=(update, bool)
    )
    files = _checked_files(path, repo, update=update)
    hub = HubClient.open(repo)
    _check_token(repo)
    if update:
        name = str(hub.ask(lambda: hub.api.model_info(repo)).id)
    else:
        name = str(hub.ask(lambda: hub.api.create_repo(repo, private=private or None)).repo_id)
    try:
        commit = _upload(hub, name, files, f"{'Update' if update else 'Add'} a petune adapter")
    except HubError as error:
        state = "The repository is unchanged" if update else f"The new repository {name} is empty"
        raise HubError(
            f"{error}. {state}, unless only the hub's answer was lost. Try again with update=True",
            cli_hint="Try again with --update",
        ) from None
    return Pushed(name, f"{hub_url()}/{name}", commit, sum(map(len, files.values())), not update)


def _checked_files(path: str | Path, repo: str, *, update: bool) -> dict[str, bytes]:
    """Check the name of the repository, then the adapter, and return the files to push."""
    check_repo_name(repo)
    if update and "/" not in repo:
        raise UsageError(f"an existing repository is named with its owner: user/{repo}, not {repo}")
    return _read_files(find_adapter(Path(path)))


def _read_files(directory: Path) -> dict[str, bytes]:
    """Read the files to push, without paths of this machine, with a new manifest (the model card may be edited)."""
    read_adapter(directory)
    names = [name for name in (CONFIG_FILE, TENSOR_FILE, CARD_FILE) if (directory / name).is_file()]
    files = {name: (directory / name).read_bytes() for name in names}
    files[CONFIG_FILE] = _hide_folders(files[CONFIG_FILE])
    return files | {MANIFEST: manifest_bytes(files)}


def _hide_folders(content: bytes) -> bytes:
    """Remove folders of this machine from `adapter_config.json`; without any, return it unchanged."""
    config = json.loads(content)
    own = petune_part(config)
    if own is None or public_metadata(own["metadata"]) == own["metadata"]:
        return content
    own["metadata"] = public_metadata(own["metadata"])
    return (json.dumps(config, indent=1) + "\n").encode()


def _check_token(repo: str) -> None:
    import huggingface_hub as hf

    if not hf.get_token():
        raise HubError(f"pushing to {repo} needs a token with write access. Run `hf auth login`, or set HF_TOKEN")


class _CountingReader(io.BytesIO):
    """Counts the bytes that were read, to show that an upload makes progress."""

    num_read = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.num_read += len(data)
        return data


def _upload(hub: HubClient, name: str, files: dict[str, bytes], message: str) -> str:
    """Upload files as one commit and return it."""
    import huggingface_hub as hf

    counting = [_CountingReader(content) for content in files.values()]
    operations = [hf.CommitOperationAdd(file, reader) for file, reader in zip(files, counting, strict=True)]

    def num_read() -> int:
        return sum(reader.num_read for reader in counting)

    hub.ask(lambda: hub.api.preupload_lfs_files(name, operations, free_memory=False), num_read)
    commit = hub.ask(
        lambda: hub.api.create_commit(name, operations, commit_message=message), num_read, timeout_s=COMMIT_TIMEOUT_S
    )
    return str(commit.oid)
