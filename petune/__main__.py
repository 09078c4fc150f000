"""The `petune` program's first lines: SIGTERM and Ctrl-C have an answer before anything that takes time is imported."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

STOPPED, INTERRUPTED = 75, 130


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit.

    Args:
        args: The words after `petune`; None takes them from the command line.
    """
    with contextlib.suppress(ValueError):  # outside the main thread, where Python delivers no signals
        signal.signal(signal.SIGTERM, _stopped_early)
        # Python gives signals their default action back while it shuts down; what is done by then is done
        atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    try:
        from petune.cli.main import main as program

        program(args)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _stopped_early(*_: object) -> NoReturn:
    """SIGTERM while libraries are imported, or when all is done; a run has a handler of its own.

    Not an exception, since libraries catch those of their imports.
    """
    os.write(2, b"error: stopped by SIGTERM outside of training, with nothing left to save; start it again\n")
    os._exit(STOPPED)


if __name__ == "__main__":
    main()
