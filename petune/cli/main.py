"""The `petune` program: its commands, its exit codes and how errors are printed. Imports nothing heavy."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from petune.base.distributed import is_main_process, is_reported_elsewhere, num_processes, process_name
from petune.base.errors import PetuneError, UsageError
from petune.base.imports import prepare_program
from petune.cli.advice import advice_for
from petune.cli.average import average
from petune.cli.backbones import backbones
from petune.cli.compare import compare
from petune.cli.convert import convert
from petune.cli.data import data
from petune.cli.datasets import datasets
from petune.cli.demo import demo
from petune.cli.env import env
from petune.cli.eval import evaluate
from petune.cli.export import export
from petune.cli.help import Command
from petune.cli.inspect import inspect
from petune.cli.methods import methods
from petune.cli.plugin import plugin
from petune.cli.predict import predict
from petune.cli.pretrain import pretrain
from petune.cli.pull import pull
from petune.cli.push import push
from petune.cli.report import report
from petune.cli.run import run
from petune.cli.sweep import sweep
from petune.cli.terminal import clean, print_status

DEBUG = "--debug"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
# PyTorch has an exception class for CUDA only. The CPU allocator, MPS and cuBLAS raise a plain RuntimeError.
NO_MEMORY = re.compile(r"can't allocate memory|MPS backend out of memory|ALLOC_FAILED")
LESS_MEMORY = (
    "Try a smaller batch size, or --grad-checkpointing. If training fits and evaluation does not, rerun with --resume "
    "--set train.eval_batch_size=N",
    "Try a smaller batch size, or --grad-checkpointing. If training fits and evaluation does not, rerun with "
    "--set train.eval_batch_size=N",
    "Try a smaller --batch-size",
)
"""Advice for a command without memory; the first one that it has all flags for is printed."""
DISTRIBUTED = ("run", "compare", "pretrain")
"""Commands that several processes may share, started by torchrun or accelerate."""
WORDS_FOR = {
    "run": "train fit finetune fine-tune",
    "eval": "evaluate test",
    "predict": "infer classify",
    "sweep": "search tune",
    "compare": "benchmark",
    "average": "soup merge",
    "push": "upload",
    "pull": "download",
}
SYNONYMS = {word: command for command, words in WORDS_FOR.items() for word in words.split()}
"""Words that users try, and the commands to suggest for them."""


class Commands(TyperGroup):
    """The commands of the program; for a word of `SYNONYMS` it suggests the command that does this."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that `args` names, or fail with a suggestion."""
        command = SYNONYMS.get(args[0].casefold()) if args else None
        if command:
            ctx.fail(f"No such command '{args[0]}'. Did you mean '{command}'?")
        return super().resolve_command(ctx, args)


# Plain help: rendering it with rich would take longer than the rest of `petune --help`.
app = typer.Typer(
    name="petune",
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for command in (run, compare, sweep, pretrain, report, inspect, predict):
    app.command(cls=Command)(command)
app.command("eval", cls=Command)(evaluate)
for command in (average, convert, export, demo, push, pull, methods, backbones, datasets, env):
    app.command(cls=Command)(command)
app.add_typer(data, name="data")
app.add_typer(plugin, name="plugin")


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        print(f"petune {version('petune')}")
        raise typer.Exit


@app.callback()
def petune(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Print the traceback of an error; works in any position.")] = False,
) -> None:
    """Fine-tune Vision Transformers by training about one percent of their parameters.

    Exit codes: 0 success, 1 the run failed, 2 usage or config error, 3 missing extra or plugin, 4 bad data or
    checkpoint, 75 stopped by Ctrl-C or SIGTERM with its progress saved,
    130 Ctrl-C where there is none, or pressed twice.
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
        prepare_program()
        _check_distributed(words)
        app(args=[word for word in words if word != DEBUG], prog_name="petune")
    except PetuneError as error:
        if not is_reported_elsewhere(error):
            _print_error(_with_hint(str(error), _advice(words, error.cli_hint)), debug)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _print_error(_describe(error, words, debug), debug)
        sys.exit(1)
    sys.exit(0)


def _describe(error: Exception, words: Sequence[str], debug: bool) -> str:
    """Return the message for an error that is not petune's own."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        reason = _why_stdout_fails()
        if reason:
            return f"cannot write to stdout: {reason.lower()}"
    if _is_out_of_memory(error):
        first_line = str(error).strip().partition("\n")[0]
        advice = next((text for text in LESS_MEMORY if _advice(words, text) == text), "")
        return _with_hint(f"out of memory: {first_line}" if first_line else "out of memory", advice)
    hint = "" if debug else f"Rerun with {DEBUG} for the traceback"
    return _with_hint(f"this is a bug in petune: {type(error).__name__}: {error}", hint)


def _advice(words: Sequence[str], advice: str) -> str:
    return advice_for(typer.main.get_command(app), words, advice)


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # if it is not imported, the error is not torch's
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def _with_hint(message: str, hint: str) -> str:
    if not hint:
        return message
    return f"{message} {hint}" if message.endswith((".", "?", "!", ":")) else f"{message}. {hint}"


def _prepare_streams() -> None:
    """Replace characters that a stream cannot encode, and discard messages where stderr is closed.

    Raises:
        UsageError: stdout is closed.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (stays open until the end)
    if sys.stdout is None:
        raise UsageError("stdout is closed. Redirect it to a file, or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _why_stdout_fails() -> str | None:
    """Return why stdout cannot be written, and redirect it so that Python does not complain again; None if it can."""
    try:
        print(flush=True)  # an unbuffered stream has already dropped what it could not write
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.strerror
    return None


def _check_distributed(words: Sequence[str]) -> None:
    """Refuse several processes for a command that would do the same work in each.

    Raises:
        UsageError: A launcher started several processes.
    """
    name = next((word for word in words if not word.startswith("-")), None)
    if num_processes() > 1 and name is not None and name not in DISTRIBUTED:
        raise UsageError(
            f"petune {name} runs in one process, but {num_processes()} were started. Start it without torchrun or "
            f"accelerate; only {', '.join(DISTRIBUTED)} support several processes"
        )


def _print_error(message: str, debug: bool) -> None:
    prefix = "" if is_main_process() else f"{process_name()}: "
    if debug:
        print_status(clean(prefix + traceback.format_exc()))
    print_status(clean(f"{prefix}error: {message}"))
