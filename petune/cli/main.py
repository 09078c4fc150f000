"""The `petune` program: its commands, and what becomes of an error. Nothing heavy is imported here."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from petune.cli.backbones import backbones
from petune.cli.compare import compare
from petune.cli.data import data
from petune.cli.datasets import datasets
from petune.cli.demo import demo
from petune.cli.env import env
from petune.cli.eval import evaluate
from petune.cli.export import export
from petune.cli.inspect import inspect
from petune.cli.methods import methods
from petune.cli.plugin import plugin
from petune.cli.predict import predict
from petune.cli.pretrain import pretrain
from petune.cli.report import report
from petune.cli.run import run
from petune.cli.share import pull, push
from petune.cli.terminal import clean, say
from petune.errors import PetuneError, Stopped

DEBUG = "--debug"

# Plain help: drawing it with rich takes longer than everything else that `petune --help` does.
app = typer.Typer(
    name="petune",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for command in (run, compare, pretrain, report, inspect, predict):
    app.command()(command)
app.command("eval")(evaluate)
for command in (demo, export, push, pull, methods, backbones, datasets, env):
    app.command()(command)
app.add_typer(data, name="data")
app.add_typer(plugin, name="plugin")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"petune {version('petune')}")
        raise typer.Exit


@app.callback()
def petune(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show the traceback of an error; may stand anywhere on the line.")
    ] = False,
) -> None:
    """Parameter-efficient fine-tuning of any Vision Transformer: one frozen backbone, many tasks.

    Exit codes: 0 good, 1 the run failed, 2 wrong usage or config, 3 a missing extra or plugin, 4 bad data or
    checkpoint, 75 stopped and can be resumed, 130 Ctrl-C.
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit.

    Args:
        args: The words after `petune`; None takes them from the command line.
    """
    words = list(sys.argv[1:] if args is None else args)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stopped_early)
    debug = DEBUG in words
    try:
        app(args=[word for word in words if word != DEBUG], prog_name="petune")
    except PetuneError as error:
        _tell(f"error: {error}", debug)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        where = "" if debug else f"; {DEBUG} shows the traceback"
        _tell(f"error: this is a bug in petune: {type(error).__name__}: {error}{where}", debug)
        sys.exit(1)
    sys.exit(0)


def _stopped_early(*_: object) -> NoReturn:
    """SIGTERM while libraries are imported; a run has a handler of its own.

    Not an exception, since libraries catch those of their imports.
    """
    os.write(2, b"error: stopped by SIGTERM outside of training, with nothing left to save; start it again\n")
    os._exit(Stopped.exit_code)


def _tell(message: str, debug: bool) -> None:
    if debug:
        say(clean(traceback.format_exc()))
    say(clean(message))


if __name__ == "__main__":
    main()
