"""Every error petune raises on purpose. Each message says what must hold, what came, and what to do.

PetuneError                  exit code 1
├── UsageError               2   a call or a configuration that cannot mean anything
│   ├── ConfigError              a key, type, range or combination is wrong (all problems in one message)
│   └── UnknownName              no method, backbone or dataset of that name (near names are listed)
├── MissingExtra             3   an optional package is needed; the message holds the command
├── PluginError              3   a registered tuner cannot be loaded (distribution and cause are named)
├── AttachError              1   a tuner cannot be put on this model; the model is as it was
│   ├── SiteNotFound             the model has no such place
│   ├── DeadSite                 the place exists, but the forward never passes it
│   ├── AlreadyCompiled          hooks would not be seen; attach first, compile afterwards
│   └── NotMergeable             the edit is not a change of weights
├── WeightsUnavailable       4   pretrained weights were asked for and cannot be had
├── HubError                 4   a hub cannot be asked, or refuses: network, token, repository
├── DataError                4   a dataset is missing, broken or contradicts itself
├── CheckpointError          4   a file petune wrote is damaged, foreign or from a newer petune
│   └── BackboneMismatch         an adapter that belongs to another backbone
├── ExportError              1   another format cannot hold the trained model, or computes something else
├── Diverged                 1   loss or gradient became NaN or infinite
├── ProcessLost              1   of several processes of one run, one is gone
└── Stopped                  75  a signal asked the run to stop; it can be resumed
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PetuneError(Exception):
    """Base of every error that petune raises on purpose.

    Args:
        message: What happened and what to do, in terms of Python arguments.
        cli_hint: The same advice as flags; the command line prints it after the message.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, cli_hint: str = "") -> None:
        super().__init__(message)
        self.cli_hint = cli_hint


class UsageError(PetuneError):
    """The call cannot mean anything: wrong names, options or combinations."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration is wrong; the message lists every problem at once."""


class UnknownName(UsageError):
    """No method, backbone or dataset of that name."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name = kind, name
        near = near_names(name, known)
        link = "" if not hint else " " if near.endswith("?") else ". "
        super().__init__(f"no {kind} is called {name!r}{near}{link}{hint}")


class MissingExtra(PetuneError):
    """An optional package is needed for this; the message holds the command that installs it."""

    exit_code = 3

    def __init__(self, purpose: str, extra: str) -> None:
        command = f'pip install "petune[{extra}]"'
        super().__init__(f"{purpose} needs an optional package. Install it with: {command}")


class PluginError(PetuneError):
    """A registered tuner cannot be loaded."""

    exit_code = 3


class AttachError(PetuneError):
    """A tuner cannot be attached to this model; the model was left as it was."""


class SiteNotFound(AttachError):
    """The model has no such place."""


class DeadSite(AttachError):
    """The model has the place, but its forward never passes it, so the edit would do nothing."""


class AlreadyCompiled(AttachError):
    """The model was compiled before the tuner was attached, so the edit would not be seen."""


class NotMergeable(AttachError):
    """The edit cannot be written as a change of the backbone's weights."""


class WeightsUnavailable(PetuneError):
    """Pretrained weights were asked for and cannot be had. petune never uses random ones instead."""

    exit_code = 4


class HubError(PetuneError):
    """A hub cannot be asked, or refuses; the message says what of network, token and repository it is."""

    exit_code = 4


class DataError(PetuneError):
    """A dataset is missing, broken or contradicts itself."""

    exit_code = 4


class CheckpointError(PetuneError):
    """A file that petune wrote is damaged, foreign or from a newer petune."""

    exit_code = 4


class BackboneMismatch(CheckpointError):
    """The adapter was trained on another backbone."""


class ExportError(PetuneError):
    """A trained model cannot be written in another format, or does not compute the same there."""


class Diverged(PetuneError):
    """Loss or gradient became NaN or infinite."""


class ProcessLost(PetuneError):
    """Several processes do one run, and one of them is gone."""


class Stopped(PetuneError):
    """A signal asked the run to stop; what it had done is saved and it can be resumed."""

    exit_code = 75


def near_names(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x' or 'y'?` for the known names closest to `name`, or the known names themselves."""
    names = sorted(known)
    small = {each.casefold(): each for each in names}
    close = [small[each] for each in difflib.get_close_matches(name.casefold(), small, n=3, cutoff=0.5)]
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close)}?"
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"; known: {shown}" if names else ""
