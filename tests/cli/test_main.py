"""The program as a whole: help, exit codes, errors as one message, what it imports."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from petune.base import errors
from petune.cli import main as program

Run = Callable[..., Any]

HELP = """\
Usage: petune [OPTIONS] COMMAND [ARGS]...

  Parameter-efficient fine-tuning of any Vision Transformer: one frozen backbone, many tasks.

  Exit codes: 0 good, 1 the run failed, 2 wrong usage or config, 3 a missing extra or plugin, 4
  bad data or checkpoint, 75 stopped and can be resumed, 130 Ctrl-C.

Options:
  --version   Print the version and exit.
  --debug     Show the traceback of an error; may stand anywhere on the line.
  -h, --help  Show this message and exit.

Commands:
  run        Train one method, test it once and save its adapter.
  compare    Train several methods alike and print one table.
  sweep      Search a method's options and training options.
  pretrain   Train a backbone from scratch, for --weights.
  report     Write one HTML page of everything below DIR….
  inspect    Show a backbone's places and what a method would train.
  predict    Name images with a trained model.
  eval       Accuracy by class, what is mistaken for what, and calibration.
  export     Write a trained model as torch.export, ONNX or plain weights.
  demo       Serve a page to try adapters on images, side by side.
  push       Put an adapter and its card on the Hugging Face Hub.
  pull       Fetch an adapter from the Hugging Face Hub.
  methods    List the installed methods, broken ones too.
  backbones  List the names that --backbone takes.
  datasets   List the names that --dataset takes, and what is here.
  env        Show versions, device, directories and precision.
  data       Look after images.
  plugin     Begin a method of your own, or check one.
"""
HEAVY = ("torch", "timm", "peft", "numpy", "accelerate", "sklearn", "matplotlib")


def test_help(petune: Run) -> None:
    done = petune("--help")
    assert (done.code, done.out, done.err) == (0, HELP, "")


@pytest.mark.parametrize("command", [c.name or c.callback.__name__ for c in program.app.registered_commands])  # type: ignore[union-attr]
def test_every_command_has_help(command: str, petune: Run) -> None:
    done = petune(command, "-h")
    assert done.code == 0
    assert f"Usage: petune {command} " in done.out
    assert done.err == ""


def test_version(petune: Run) -> None:
    done = petune("--version")
    assert (done.code, done.out) == (0, f"petune {version('petune')}\n")


@pytest.mark.parametrize("words", [("--help",), ("run", "--help"), ("compare", "-h")])
def test_help_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY} if m in sys.modules]))\n"
        f"from petune.cli.main import main; main({list(words)})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_listing_methods_imports_no_torch() -> None:
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('TORCH', 'torch' in sys.modules, file=sys.stderr))\n"
        "from petune.cli.main import main; main(['methods'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "TORCH False"


def test_the_module_is_the_program() -> None:
    done = subprocess.run([sys.executable, "-m", "petune", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: petune [OPTIONS] COMMAND")


def test_no_words_show_the_help(petune: Run) -> None:
    done = petune()
    assert done.code == 2
    assert "Commands:" in done.out + done.err


@pytest.mark.parametrize(
    ("words", "near"),
    [(("rum",), "'run'"), (("run", "--epoch", 3), "--epochs"), (("run", "--epochs", "many"), "'--epochs'")],
)
def test_wrong_usage_is_2_with_near_names(words: tuple[str, ...], near: str, petune: Run) -> None:
    done = petune(*words)
    assert (done.code, done.out) == (2, "")
    assert near in done.err


ERRORS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.PetuneError)]


@pytest.mark.parametrize("kind", [e for e in ERRORS if e not in (errors.UnknownName, errors.MissingExtra)])
def test_an_error_is_one_message_and_its_exit_code(
    kind: type[errors.PetuneError], petune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing(monkeypatch, kind("what must hold\n  - and more"))
    done = petune("env")
    assert (done.code, done.out, done.err) == (kind.exit_code, "", "error: what must hold\n  - and more\n")


@pytest.mark.parametrize("words", [("--debug", "env"), ("env", "--debug")])
def test_debug_shows_the_traceback(words: tuple[str, ...], petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _failing(monkeypatch, errors.DataError("broken"))
    done = petune(*words)
    assert done.code == 4
    assert done.err.startswith("Traceback (most recent call last):")
    assert done.err.endswith("\nerror: broken\n")


def test_a_bug_is_called_a_bug(petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _failing(monkeypatch, KeyError("x"))
    done = petune("env")
    expected = "error: this is a bug in petune: KeyError: 'x'; --debug shows the traceback\n"
    assert (done.code, done.out, done.err) == (1, "", expected)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "CUDA out of memory."),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "can't allocate memory"),
        (MemoryError(), "memory must suffice, but ran out (MemoryError);"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "MPS backend out of memory"),
    ],
)
def test_no_memory_is_no_bug(error: Exception, why: str, petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _failing(monkeypatch, error)
    done = petune("env")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: memory must suffice, but ran out (")
    assert why in done.err
    assert done.err.endswith("it goes on with --resume and a smaller train.eval_batch_size\n")


def test_ctrl_c_is_130(petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _failing(monkeypatch, KeyboardInterrupt())
    assert petune("env").code == 130


def test_control_characters_do_not_reach_the_terminal(petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _failing(monkeypatch, errors.DataError("class \x1b[31mred\x1b[0m\x07 and \u202etxt.exe"))
    assert petune("env").err == "error: class [31mred[0m and txt.exe\n"


def _failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("petune.cli.env.environment", fail)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_signal_while_libraries_are_imported_is_75(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "petune", "run", "--method=linear", "--backbone=vit_nano", "--dataset=digits"]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text() and process.poll() is None:
        time.sleep(0.005)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped by SIGTERM" in err


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_what_a_terminal_cannot_encode_is_replaced(encoding: str, tmp_path: Path) -> None:
    for name in ("кот", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    words = [sys.executable, "-m", "petune", "data", "check", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (4, b"")
    assert b"| ???   |" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
@pytest.mark.parametrize(("command", "to"), [("methods", "/dev/full"), ("--help", "/dev/full"), ("env", "&-")])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_cannot_be_written_is_one_line(unbuffered: str, command: str, to: str) -> None:
    line, env = f"{sys.executable} -m petune {command} >{to}", {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == (2 if to == "&-" else 1)
    reason = "be open for" if to == "&-" else "take what petune prints, but cannot be written: No space left on device"
    assert done.stderr.startswith(f"error: stdout must {reason}")
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_stderr_keeps_the_talk_from_stdout() -> None:
    line = f"{sys.executable} -m petune backbones --json 2>&-"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[")
    talk = subprocess.run(line.replace("--json", "zzz"), shell=True, capture_output=True, text=True, check=True)
    assert talk.stdout == ""
