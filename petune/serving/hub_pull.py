"""Pull an adapter from the Hugging Face Hub.

A repository is untrusted: only files with known names and limited sizes are downloaded, they are read as an adapter
before they are put in place, and an adapter that names code to build its backbone is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from petune.adapters.format import (
    CARD_FILE,
    CONFIG_FILE,
    TENSOR_FILE,
    SavedAdapter,
    check_replaceable,
    read_adapter,
)
from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import CheckpointError
from petune.base.files import MANIFEST, write_directory
from petune.base.hub import hub_url
from petune.serving.hub_client import HubClient
from petune.serving.restore import check_no_user_code
from petune.serving.transfer import directory_size

MAX_BYTES = {CONFIG_FILE: 8 << 20, TENSOR_FILE: 16 << 30, CARD_FILE: 1 << 20, MANIFEST: 1 << 20}
"""The files that are downloaded, and their largest sizes."""
SLACK_BYTES = 1 << 20  # for huggingface_hub's own files


@dataclass(frozen=True)
class Pulled:
    """Result of a pull.

    Attributes:
        repo, commit: Where it came from.
        output: The adapter directory.
        bytes: Size of its files.
        method, backbone: What was trained, on which backbone.
    """

    repo: str
    commit: str
    output: str
    bytes: int
    method: str
    backbone: str


def pull(
    repo: str, output: str | Path | None = None, *, revision: str | None = None, trust_remote_code: bool = False
) -> Pulled:
    """Pull an adapter directory from the Hugging Face Hub.

    Args:
        repo: `user/name`.
        output: The directory to create; by default the repository's name, here. An existing adapter is replaced.
        revision: A branch, tag or commit; the newest by default.
        trust_remote_code: Accept an adapter whose backbone is built by the function `package.module:factory`.

    Raises:
        UsageError: `output` is not an adapter directory, or `repo` is not a valid name.
        HubError: The hub cannot be reached or refuses, or there is no such repository or revision.
        CheckpointError: The repository has no valid adapter; nothing was changed.
    """
    check_arguments(
        "petune.pull",
        repo=(repo, str),
        output=(output, PathText | None),
        revision=(revision, str | None),
        trust_remote_code=(trust_remote_code, bool),
    )
    target = expand_home(output) if output is not None else Path(repo.rpartition("/")[2])
    check_replaceable(target)
    hub = HubClient.open(repo)
    info = hub.ask(lambda: hub.api.model_info(repo, revision=revision, files_metadata=True))
    listed = _check_listing(repo, info.siblings or ())
    with _scratch_directory(target) as scratch:
        _download(hub, str(info.sha), listed, scratch)
        adapter = _read(repo, scratch, listed)
        if not trust_remote_code:
            check_no_user_code(adapter, repo)
        files = {name: (scratch / name).read_bytes() for name in listed if name != MANIFEST}
    write_directory(target, files)
    return Pulled(
        repo=repo,
        commit=str(info.sha),
        output=str(target),
        bytes=sum(map(len, files.values())),
        method=str(adapter.config["tuner"]),
        backbone=_backbone_name(adapter),
    )


@contextlib.contextmanager
def _scratch_directory(target: Path) -> Iterator[Path]:
    """Create a directory next to `target`, and delete it afterwards.

    Raises:
        CheckpointError: It cannot be created or written.
    """
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        yield scratch
    except OSError as error:
        raise CheckpointError(f"cannot write to {target.parent}: {error.strerror or error}. Use another path") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _check_listing(repo: str, siblings: Any) -> dict[str, Any]:
    """Select the files of an adapter from a repository's listing.

    Raises:
        CheckpointError: One is missing or too large.
    """
    listed = {file.rfilename: file for file in siblings if file.rfilename in MAX_BYTES}
    missing = [name for name in (CONFIG_FILE, TENSOR_FILE) if name not in listed]
    if missing:
        shown = ", ".join(sorted(file.rfilename for file in siblings)[:8]) or "nothing"
        raise CheckpointError(
            f"no adapter in {repo}: {' and '.join(missing)} is missing. It contains {shown} (petune reads no pickles)"
        )
    for name, file in listed.items():
        if file.size is not None and file.size > MAX_BYTES[name]:
            raise CheckpointError(
                f"{name} of {repo} has {file.size:,} bytes, more than the {MAX_BYTES[name]:,} that are allowed. It was "
                "not downloaded"
            )
    return listed


def _download(hub: HubClient, commit: str, listed: Mapping[str, Any], directory: Path) -> None:
    from huggingface_hub import hf_hub_download

    sizes = [MAX_BYTES[name] if file.size is None else file.size for name, file in listed.items()]
    limit = sum(sizes) + SLACK_BYTES

    def downloaded() -> int:
        size = directory_size(directory)
        if size > limit:
            raise CheckpointError(f"{hub.repo} sends more than the {limit:,} bytes of its listing. Stopped")
        return size

    for name in listed:
        fetch = partial(hf_hub_download, hub.repo, name, revision=commit, local_dir=directory, endpoint=hub_url())
        hub.ask(fetch, downloaded)


def _read(repo: str, directory: Path, listed: Mapping[str, Any]) -> SavedAdapter:
    """Read the downloaded adapter.

    Raises:
        CheckpointError: It differs from the listing, or is not a valid adapter.
    """
    for name, file in listed.items():
        expected = getattr(file.lfs, "sha256", None)
        if expected and hashlib.sha256((directory / name).read_bytes()).hexdigest() != expected:
            raise CheckpointError(f"{name} of {repo} was damaged on the way: its SHA-256 is wrong. Try again")
    try:
        return read_adapter(directory)
    except CheckpointError as error:
        raise CheckpointError(f"{repo} has no valid adapter; nothing was changed here. {error}") from None


def _backbone_name(adapter: SavedAdapter) -> str:
    backbone = adapter.config["metadata"].get("backbone")
    name = backbone.get("full_name") if isinstance(backbone, Mapping) else None
    return str(name or "an unknown backbone")
