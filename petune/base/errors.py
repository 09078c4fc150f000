"""All exceptions that petune raises on purpose. Every message says what happened and what to do.

PetuneError                  exit code 1
├── UsageError               2   a call or configuration that makes no sense
│   ├── ConfigError              unknown key, wrong type, value out of range (lists every problem)
│   └── UnknownName              no method, backbone or dataset with that name (suggests similar names)
├── MissingExtra             3   an optional package is not installed (shows the pip command)
├── PluginError              3   a registered tuner, dataset or task cannot be loaded (names the package and the cause)
├── AttachError              1   a tuner cannot be attached to this model (the model is unchanged)
│   ├── SiteNotFound             the model has no such part
│   ├── DeadSite                 the model has the part, but its forward never uses it
│   ├── AlreadyCompiled          the model was compiled first; attach, then compile
│   └── NotMergeable         2   the tuner does more than change weights
├── WeightsUnavailable       4   pretrained weights are neither cached nor downloadable
├── HubError                 4   a hub is unreachable or refuses: network, token, repository
├── DataError                4   a dataset is missing, broken or inconsistent
├── CheckpointError          4   a file is damaged, not petune's, or written by a newer petune
│   └── BackboneMismatch         the adapter was trained on another backbone
├── ExportError              1   the target format cannot represent the model, or its output differs
├── Diverged                 1   loss or gradient became NaN or infinite
├── ProcessLost              1   one process of a distributed run is gone
├── ContractViolation        1   a tuner breaks the contract that `check_tuner` checks
└── Stopped                  75  stopped by a signal; rerun to resume
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_SUGGESTIONS, MAX_LISTED = 3, 12


class PetuneError(Exception):
    """Base class of every error that petune raises on purpose.

    Args:
        message: What happened and what to do, in terms of Python arguments.
        cli_hint: The same advice as flags; the command line prints it after the message.

    Attributes:
        raised_on_all_ranks: All processes of a distributed run raise this error, so only one prints it.
    """

    exit_code = 1
    raised_on_all_ranks = False

    def __init__(self, message: str = "", *, cli_hint: str = "") -> None:
        super().__init__(message)
        self.cli_hint = cli_hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Make every subclass picklable, whatever its constructor takes: errors travel between processes."""
        return _restore, (type(self), self.args, self.__dict__)


class UsageError(PetuneError):
    """The call makes no sense: wrong names, options or combinations."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

    Attributes:
        key: The dotted key, `train.lr`.
        message: What is wrong with it.
        unknown: The key does not exist.
    """

    key: str
    message: str
    unknown: bool = False


class ConfigError(UsageError):
    """A configuration is wrong.

    Args:
        message: All problems, one a line.
        problems: The same as data; empty where the error is not about single keys.
        cli_hint: See `PetuneError`.
    """

    def __init__(self, message: str = "", problems: Sequence[Problem] = (), *, cli_hint: str = "") -> None:
        super().__init__(message, cli_hint=cli_hint)
        self.problems = tuple(problems)


class UnknownName(UsageError):
    """No method, backbone or dataset has that name.

    Args:
        kind: What was looked for: `dataset`.
        name: The name as given.
        known: The names that exist; the message suggests similar ones.
        hint: A sentence of advice.
        cli_hint: See `PetuneError`.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "", *, cli_hint: str = "") -> None:
        names = sorted(known)
        shown = name if re.fullmatch(r"[\w.:/+-]+", name) else repr(name)
        sentence = f"no such {kind}: {shown}{did_you_mean(name, names)}"
        if hint:
            sentence += f"{'' if sentence.endswith(('?', '…')) else '.'} {hint}"
        super().__init__(sentence, cli_hint=cli_hint)
        self.kind = kind
        self.name = name
        self.suggestions = similar_names(name, names)


class MissingExtra(PetuneError):
    """An optional package is not installed; the message shows the command that installs it."""

    exit_code = 3

    def __init__(self, purpose: str, extra: str) -> None:
        super().__init__(f'{purpose} needs an optional package. Install it with: pip install "petune[{extra}]"')
        self.extra = extra


class PluginError(PetuneError):
    """A registered tuner, dataset or task cannot be loaded."""

    exit_code = 3


class AttachError(PetuneError):
    """A tuner cannot be attached to this model, which is unchanged; or its adapter does not fit a later call of it."""


class SiteNotFound(AttachError):
    """The model has no such part.

    Attributes:
        role: The site that a block lacks, such as `mlp`; empty if something else is missing.
    """

    def __init__(self, message: str = "", *, role: str = "", cli_hint: str = "") -> None:
        super().__init__(message, cli_hint=cli_hint)
        self.role = role


class DeadSite(AttachError):
    """The model has the part, but its forward never uses it, so an edit there would do nothing."""


class AlreadyCompiled(AttachError):
    """The model was compiled before the tuner was attached, so the edit would be ignored."""


class NotMergeable(AttachError):
    """The tuner does more than change weights of the backbone, so it cannot be merged into them.

    Args:
        message: Why.
        changes_output: True if an adapter's `merge` ran, but the merged model computed something else: a fault of
            that `merge`, unlike an adapter that cannot be merged at all.
        cli_hint: See `PetuneError`.
    """

    exit_code = 2

    def __init__(self, message: str = "", *, changes_output: bool = False, cli_hint: str = "") -> None:
        super().__init__(message, cli_hint=cli_hint)
        self.changes_output = changes_output
        if changes_output:
            self.exit_code = 1


class WeightsUnavailable(PetuneError):
    """Pretrained weights are neither cached nor downloadable. petune never uses random ones instead.

    Args:
        message: Why.
        is_offline: True if they could be downloaded, but their server cannot be reached now.
        cli_hint: See `PetuneError`.
    """

    exit_code = 4

    def __init__(self, message: str = "", *, is_offline: bool = False, cli_hint: str = "") -> None:
        super().__init__(message, cli_hint=cli_hint)
        self.is_offline = is_offline


class HubError(PetuneError):
    """A hub is unreachable or refuses; the message says whether it is the network, the token or the repository."""

    exit_code = 4


class DataError(PetuneError):
    """A dataset is missing, broken or inconsistent.

    Attributes:
        broken: A message for each image that cannot be decoded, if that is what is wrong and all were tried.
    """

    exit_code = 4
    broken: tuple[str, ...] = ()


class CheckpointError(PetuneError):
    """A file is damaged, was not written by petune, or was written by a newer petune."""

    exit_code = 4


class BackboneMismatch(CheckpointError):
    """The adapter was trained on another backbone."""


class ExportError(PetuneError):
    """The target format cannot represent the model, or the exported model computes something else."""


class Diverged(PetuneError):
    """Loss or gradient became NaN or infinite."""


class ProcessLost(PetuneError):
    """One process of a distributed run is gone."""


class ContractViolation(PetuneError, AssertionError):
    """A property of the tuner contract does not hold; the message names it. Test runners show it as a failure."""


class Stopped(PetuneError):
    """A signal stopped the run; its progress is saved. The same call resumes it, of a single run with resume=True."""

    exit_code = 75


def _restore(cls: type[PetuneError], args: tuple[Any, ...], fields: dict[str, Any]) -> PetuneError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(fields)
    return error


def similar_names(name: str, known: Iterable[str], cutoff: float = 0.5) -> tuple[str, ...]:
    """Return up to three of the known names that are most similar to `name`, best first; case is ignored."""
    by_folded = {candidate.casefold(): candidate for candidate in known}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=MAX_SUGGESTIONS, cutoff=cutoff)
    return tuple(by_folded[folded] for folded in close)


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `. Did you mean x or y?` to append to a message, or `. Known: …` if nothing is similar.

    Args:
        name: As given.
        known: The names that exist.
        prefix: Put before each name that is shown.
    """
    names = sorted(known)
    similar = similar_names(name, names)
    if similar:
        return f". Did you mean {' or '.join(prefix + each for each in similar)}?"
    listed = ", ".join(prefix + each for each in names[:MAX_LISTED]) + (", …" if len(names) > MAX_LISTED else "")
    return f". Known: {listed}" if names else ""
