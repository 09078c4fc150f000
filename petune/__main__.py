"""Entry point of the `petune` program. Handles SIGTERM and Ctrl-C before any slow import."""

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
    with contextlib.suppress(ValueError):  # not in the main thread, where Python allows no handlers
        signal.signal(signal.SIGTERM, _exit_stopped)
        # Python restores the default action while it shuts down. By then all work is done, so ignore the signal.
        atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    try:
        from petune.cli.main import main as program

        program(args)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _exit_stopped(*_: object) -> NoReturn:
    """Exit on SIGTERM while libraries are imported or after the work is done; training has its own handler.

    This does not raise, because libraries catch exceptions during their imports.
    """
    os.write(2, b"error: stopped by SIGTERM outside of training; there is nothing to save. Rerun the same command\n")
    os._exit(STOPPED)


if __name__ == "__main__":
    main()
