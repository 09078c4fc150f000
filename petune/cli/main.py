"""The `petune` program: its commands, and what becomes of an error. Nothing heavy is imported here."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from petune.base.distributed import is_main_process, is_reported_elsewhere, num_processes, process_name
from petune.base.errors import PetuneError, UsageError
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
from petune.cli.sweep import sweep
from petune.cli.terminal import clean, print_status

DEBUG = "--debug"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
NO_MEMORY = re.compile(r"out of memory|annot allocate memory|can't allocate memory|ALLOC_FAILED")
LESS_MEMORY = (
    "use smaller batches or a smaller model; a training also takes --grad-checkpointing, and where only its evaluation "
    "does not fit, it goes on with --resume and a smaller train.eval_batch_size"
)
SEVERAL = ("run", "compare", "pretrain")
"""Commands that torchrun may start: their processes do one run together."""

# Plain help: drawing it with rich takes longer than everything else that `petune --help` does.
app = typer.Typer(
    name="petune",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for command in (run, compare, sweep, pretrain, report, inspect, predict):
    app.command()(command)
app.command("eval")(evaluate)
for command in (export, demo, push, pull, methods, backbones, datasets, env):
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
    debug = DEBUG in words
    try:
        _prepare_streams()
        _refuse_several(words)
        app(args=[word for word in words if word != DEBUG], prog_name="petune")
    except PetuneError as error:
        if not is_reported_elsewhere(error):
            hint = f". {error.cli_hint}" if error.cli_hint else ""
            _tell(f"error: {error}{hint}", debug)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        lost = _output_lost() if isinstance(error, OSError) and error.errno in DISK_ERRORS else None
        if lost:
            _tell(f"error: stdout must take what petune prints, but cannot be written: {lost}", debug)
            sys.exit(1)
        if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):  # torch says so by RuntimeError
            why = str(error).strip().partition("\n")[0] or type(error).__name__
            _tell(f"error: memory must suffice, but ran out ({why}); {LESS_MEMORY}", debug)
            sys.exit(1)
        where = "" if debug else f"; {DEBUG} shows the traceback"
        _tell(f"error: this is a bug in petune: {type(error).__name__}: {error}{where}", debug)
        sys.exit(1)
    sys.exit(0)


def _prepare_streams() -> None:
    """What a stream cannot encode is replaced there, and a closed stderr drops the talk.

    Raises:
        UsageError: stdout is closed.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (till the end)
    if sys.stdout is None:
        raise UsageError("stdout must be open for what petune prints, but is closed; redirect it: > /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _output_lost() -> str | None:
    """Why stdout takes no more, as on a full disk; None if it does. Python will not complain again at its end."""
    try:
        print(flush=True)  # an unbuffered stream has forgotten what it could not write
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.strerror
    return None


def _refuse_several(words: Sequence[str]) -> None:
    """Of a command that trains nothing, a launcher's processes would each do all of it."""
    name = next((word for word in words if not word.startswith("-")), None)
    if num_processes() > 1 and name is not None and name not in SEVERAL:
        raise UsageError(
            f"only {', '.join(SEVERAL)} are done by several processes together, but {num_processes()} were started "
            f"for petune {name}; start it without torchrun or accelerate"
        )


def _tell(message: str, debug: bool) -> None:
    who = "" if is_main_process() else f"{process_name()}: "
    if debug:
        print_status(clean(who + traceback.format_exc()))
    print_status(clean(who + message))
