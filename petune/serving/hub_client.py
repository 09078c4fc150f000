"""Ask the Hugging Face Hub about one repository: every failure is one HubError, within seconds."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from petune.base.errors import HubError, PetuneError, UsageError
from petune.base.hub import hub_url, why_unreachable
from petune.serving.transfer import small_chunks, while_progressing

DISK_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EPERM}


@dataclass(frozen=True)
class HubClient:
    """A repository on the hub.

    Attributes:
        repo: `user/name`.
        api: huggingface_hub's client.
    """

    repo: str
    api: Any

    @classmethod
    def open(cls, repo: str) -> HubClient:
        """Check the name of a repository, and that the hub can be reached.

        Raises:
            UsageError: It is not a valid name.
            HubError: The hub cannot be reached.
        """
        import huggingface_hub as hf

        check_repo_name(repo)
        problem = why_unreachable(hub_url(), is_hub=True)
        if problem is not None:
            raise HubError(f"cannot ask the hub for {repo}: {problem}. Nothing was transferred")
        return cls(repo, hf.HfApi(endpoint=hub_url()))

    def ask(self, call: Callable[[], Any], moved: Callable[[], int] = lambda: 0, timeout_s: float | None = None) -> Any:
        """Return the result of a call to the hub.

        Args:
            call: The call.
            moved: Returns the bytes transferred so far.
            timeout_s: See `while_progressing`.

        Raises:
            HubError: The hub refuses, fails or does not answer.
            OSError: The disk is full or not writable.
        """
        try:
            with small_chunks(), _quiet():
                return while_progressing(call, moved, timeout_s)
        except PetuneError:
            raise
        except Exception as error:  # the client raises dozens of types, and each means that the call failed
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            raise _hub_error(self.repo, error) from None


def check_repo_name(repo: str) -> None:
    """Check the name of a repository as the hub would, without asking it.

    Raises:
        UsageError: It is not a valid name.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        _hub_utils().validate_repo_id(repo)
    except HFValidationError:
        raise UsageError(
            f"not a valid repository name: {repo!r}. Use user/name, of letters, digits, '-', '_' and '.', at most 96 "
            "characters"
        ) from None


def _hub_utils() -> Any:
    import huggingface_hub.utils  # the package alone does not always import it

    return huggingface_hub.utils  # untyped, because it does not declare these functions as its own


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence huggingface_hub's progress bars and its warnings about retries, inside the context."""
    utils = _hub_utils()
    verbosity, had_bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if had_bars:
            utils.enable_progress_bars()


def _hub_error(repo: str, error: BaseException) -> HubError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    url = hub_url()
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, GatedRepoError):
        return HubError(f"{repo} is gated. Ask its owner for access at {url}/{repo}")
    if isinstance(cause, RepositoryNotFoundError):
        return HubError(
            f"no such repository: {repo} at {url}. If it is private, run `hf auth login` or set HF_TOKEN first"
        )
    if isinstance(cause, RevisionNotFoundError):
        return HubError(f"{repo} has no such revision. Name a branch, tag or commit of {url}/{repo}")
    if status == 409:
        return HubError(
            f"{repo} already exists at {url}. Use update=True to add a commit, or another name",
            cli_hint="Add --update to add a commit",
        )
    if status in (401, 403):
        return HubError(f"{url} refuses this token for {repo} ({status}). Use a token with write access to it")
    reason = " ".join(str(cause).split())[:300]
    return HubError(f"{url} failed for {repo}: {type(cause).__name__}: {reason}")
