"""Adapter directories to the Hugging Face Hub and from it: `petune push`, `petune pull`.

What comes from a hub was written by anyone. Only files of known names and limited size are taken, they are read as an
adapter before they are put in their place, and an adapter that names code to build its backbone with is refused.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from petune.adapters.card import public_metadata
from petune.adapters.format import (
    CARD_FILE,
    CONFIG_FILE,
    TENSOR_FILE,
    SavedAdapter,
    adapter_path,
    check_replaceable,
    read_adapter,
)
from petune.adapters.peft_format import petune_part
from petune.base.arguments import PathText, check_arguments
from petune.base.config import expand_home
from petune.base.errors import CheckpointError, HubError, PetuneError, UsageError
from petune.base.files import MANIFEST, manifest_bytes, write_directory
from petune.base.hub import hub_url, why_unreachable
from petune.runner.directory_kind import explain_missing_adapter
from petune.serving.restore import check_no_user_code
from petune.serving.transfer import directory_size, small_chunks, while_progressing

MOST_BYTES = {CONFIG_FILE: 8 << 20, TENSOR_FILE: 16 << 30, CARD_FILE: 1 << 20, MANIFEST: 1 << 20}
"""The files that are taken, and how large each may be."""
COMMIT_S = 30.0  # a hub may take its time over a commit: whether it was made would else not be known
DISK = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EPERM}


@dataclass(frozen=True)
class Pushed:
    """Result of a push: the repository, its address, the commit, the bytes of the files, whether it is new."""

    repo: str
    url: str
    commit: str
    bytes: int
    new: bool


@dataclass(frozen=True)
class Pulled:
    """Result of a pull: from which repository and commit, where it is now, its bytes, method and backbone."""

    repo: str
    commit: str
    output: str
    bytes: int
    method: str
    backbone: str


def push(path: str | Path, repo: str, *, private: bool = False, update: bool = False) -> Pushed:
    """Put an adapter directory into a repository of the Hugging Face Hub.

    Args:
        path: A run directory, or an adapter directory.
        repo: `user/name`.
        private: A new repository is only to be seen by those who are let in.
        update: Add a commit to a repository that exists; without it a new one is made.

    Raises:
        CheckpointError: `path` is no whole adapter directory.
        UsageError: `repo` is no name of a repository.
        HubError: No network or token, the repository exists (or, with `update`, does not), the hub refuses.
    """
    import huggingface_hub as hf

    check_arguments(
        "petune.push", path=(path, PathText), repo=(repo, str), private=(private, bool), update=(update, bool)
    )
    place = adapter_path(expand_home(path))
    if not (place / CONFIG_FILE).is_file():
        raise CheckpointError(explain_missing_adapter(place))
    read_adapter(place)
    files = {name: (place / name).read_bytes() for name in MOST_BYTES if name != MANIFEST and (place / name).is_file()}
    files[CONFIG_FILE] = _public(files[CONFIG_FILE])
    files[MANIFEST] = manifest_bytes(files)  # anew, since a model card may have been edited
    api = _api(repo)
    if not hf.get_token():
        raise HubError(f"pushing to {repo} needs a token that may write; run `hf auth login`, or set HF_TOKEN")
    made = _asked(repo, lambda: _repository(api, repo, private, update), lambda: 0)
    contents = [_Counted(content) for content in files.values()]
    operations = [hf.CommitOperationAdd(name, content) for name, content in zip(files, contents, strict=True)]

    def moved() -> int:
        return sum(content.been for content in contents)

    try:
        _asked(repo, lambda: api.preupload_lfs_files(made, operations, free_memory=False), moved)
        words = f"{'Update' if update else 'Add'} a petune adapter"
        commit = _asked(
            repo, lambda: api.create_commit(made, operations, commit_message=words), moved, silence_s=COMMIT_S
        )
    except HubError as error:
        state = "the repository is as it was" if update else f"{made} was made and is empty: add --update to try again"
        raise HubError(f"{error} ({state}, unless the hub was only late to say so)") from None
    return Pushed(made, f"{hub_url()}/{made}", str(commit.oid), sum(map(len, files.values())), not update)


def pull(
    repo: str, output: str | Path | None = None, *, revision: str | None = None, trust_remote_code: bool = False
) -> Pulled:
    """Fetch an adapter directory from the Hugging Face Hub.

    Args:
        repo: `user/name`.
        output: Where to put it; the repository's name here by default. An adapter that is there is replaced.
        revision: A branch, tag or commit; the newest by default.
        trust_remote_code: Accept an adapter whose backbone is built by its author's own function, which petune
            would call.

    Raises:
        UsageError: `output` is something else, or `repo` is no name of a repository.
        HubError: No network, no such repository or revision, or not for you.
        CheckpointError: It holds no whole adapter; nothing was changed.
    """
    optional = {"output": (output, PathText | None), "revision": (revision, str | None)}
    check_arguments("petune.pull", repo=(repo, str), trust_remote_code=(trust_remote_code, bool), **optional)
    target = expand_home(output) if output is not None else Path(repo.rpartition("/")[2])
    check_replaceable(target)
    api = _api(repo)
    info = _asked(repo, lambda: api.model_info(repo, revision=revision, files_metadata=True), lambda: 0)
    listed = {file.rfilename: file for file in info.siblings or () if file.rfilename in MOST_BYTES}
    _check_listing(repo, listed, [file.rfilename for file in info.siblings or ()])
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        _download(repo, info.sha, listed, scratch)
        saved = _read(repo, scratch, listed)
        if not trust_remote_code:
            check_no_user_code(saved, repo)
        files = {name: (scratch / name).read_bytes() for name in listed if name != MANIFEST}
    except OSError as error:
        raise CheckpointError(f"cannot write beside {target}: {error.strerror or error}; name another place") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    write_directory(target, files)
    backbone = saved.config["metadata"].get("backbone") or {}
    named = str(backbone.get("full_name") or "not said") if isinstance(backbone, Mapping) else "not said"
    size = sum(map(len, files.values()))
    return Pulled(repo, str(info.sha), str(target), size, str(saved.config["tuner"]), named)


def _public(content: bytes) -> bytes:
    """`adapter_config.json` without the folders of this machine; as it is where it names none."""
    config = json.loads(content)
    own = petune_part(config)
    if own is None or public_metadata(own["metadata"]) == own["metadata"]:
        return content
    own["metadata"] = public_metadata(own["metadata"])
    return (json.dumps(config, indent=1) + "\n").encode()


class _Counted(io.BytesIO):
    """Bytes that know how many of them were read: an upload that goes on."""

    been = 0

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        self.been += len(found)
        return found


def _api(repo: str) -> Any:
    """Client of the hub, where it is there.

    Raises:
        UsageError, HubError: See `push`.
    """
    import huggingface_hub as hf
    import huggingface_hub.utils  # which the package alone does not always bring along
    from huggingface_hub.errors import HFValidationError

    tools: Any = hf.utils
    try:
        tools.validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"a repository is named as user/name, but came {repo!r}: {error}") from None
    problem = why_unreachable(hub_url(), is_hub=True)
    if problem is not None:
        raise HubError(f"{repo} is on a hub, but {problem}; nothing was sent or fetched")
    tools.disable_progress_bars()
    tools.logging.set_verbosity_error()  # its remarks on every try again would surround the one message
    return hf.HfApi(endpoint=hub_url())


def _repository(api: Any, repo: str, private: bool, update: bool) -> str:
    """The full name of the repository, made now unless it is to be updated."""
    if update:
        return str(api.model_info(repo).id)
    return str(api.create_repo(repo, private=private or None).repo_id)


def _asked(repo: str, question: Callable[[], Any], moved: Callable[[], int], silence_s: float | None = None) -> Any:
    """The hub's answer.

    Raises:
        HubError: It has none, in one line.
    """
    try:
        with small_chunks():
            return while_progressing(question, moved, silence_s)
    except PetuneError:
        raise
    except Exception as error:  # the client raises dozens of types; each means that the hub does not do it
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        raise HubError(_reason(repo, error)) from None


def _reason(repo: str, error: BaseException) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    inner = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    status = getattr(getattr(inner, "response", None), "status_code", None)
    if isinstance(inner, GatedRepoError):
        return f"{repo} is gated: ask its owner for access at {hub_url()}/{repo}"
    if isinstance(inner, RepositoryNotFoundError):
        return (
            f"there is no model repository {repo} at {hub_url()} that you may see; check the name, and if it is "
            "private, run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(inner, RevisionNotFoundError):
        return f"{repo} has no such revision; name a branch, tag or commit of {hub_url()}/{repo}"
    if status == 409:
        return f"{repo} exists at {hub_url()} already; --update adds a commit to it, or name another"
    if status in (401, 403):
        return f"{hub_url()} does not let this token do that with {repo} ({status}); use one that may write there"
    text = " ".join(str(inner).split())[:300]
    return f"{hub_url()} cannot be used for {repo} now: {type(inner).__name__}: {text}"


def _check_listing(repo: str, listed: Mapping[str, Any], names: list[str]) -> None:
    missing = [name for name in (CONFIG_FILE, TENSOR_FILE) if name not in listed]
    if missing:
        shown = ", ".join(sorted(names)[:8]) or "nothing"
        raise CheckpointError(
            f"{repo} must hold an adapter, {CONFIG_FILE} and {TENSOR_FILE}, but lacks {' and '.join(missing)}; it has "
            f"{shown} (petune reads no pickles)"
        )
    for name, file in listed.items():
        if file.size is not None and file.size > MOST_BYTES[name]:
            raise CheckpointError(
                f"{name} of {repo} must have at most {MOST_BYTES[name]:,} bytes, but has {file.size:,}; not fetched"
            )


def _download(repo: str, commit: str, listed: Mapping[str, Any], place: Path) -> None:
    from huggingface_hub import hf_hub_download

    most = sum(MOST_BYTES[name] if file.size is None else file.size for name, file in listed.items()) + (1 << 20)

    def arrived() -> int:
        now = directory_size(place)
        if now > most:
            raise CheckpointError(f"{repo} sends more than the {most:,} bytes that it said; stopped")
        return now

    for name in listed:
        fetch = partial(hf_hub_download, repo, name, revision=commit, local_dir=place, endpoint=hub_url())
        _asked(repo, fetch, arrived)


def _read(repo: str, place: Path, listed: Mapping[str, Any]) -> SavedAdapter:
    """Read the downloaded files, and check that they are the adapter in the hub's listing."""
    for name, file in listed.items():
        expected = getattr(file.lfs, "sha256", None)
        if expected and hashlib.sha256((place / name).read_bytes()).hexdigest() != expected:
            raise CheckpointError(
                f"{name} of {repo} must have the SHA-256 that the hub says, but has another; try again"
            )
    try:
        return read_adapter(place)
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).replace(str(place), repo)}; nothing was changed here") from None
