"""The program as a whole: help, exit codes, errors, and what it imports."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from petune.base import errors
from petune.cli import main as program

Run = Callable[..., Any]

HELP = """\
Usage: petune [OPTIONS] COMMAND [ARGS]...

  Fine-tune Vision Transformers by training about one percent of their parameters.

  Exit codes: 0 success, 1 the run failed, 2 usage or config error, 3 missing extra or plugin, 4
  bad data or checkpoint, 75 stopped by Ctrl-C or SIGTERM with its progress saved, 130 Ctrl-C
  where there is none, or pressed twice.

Options:
  --version   Print the version and exit.
  --debug     Print the traceback of an error; works in any position.
  -h, --help  Show this message and exit.

Commands:
"""
COMMANDS = [
    "run", "compare", "sweep", "pretrain", "report", "inspect", "predict", "eval", "average", "convert",
    "export", "demo", "push", "pull", "methods", "backbones", "datasets", "env", "data", "plugin",
]  # fmt: skip
HEAVY = ("torch", "timm", "peft", "numpy", "accelerate", "sklearn", "matplotlib")


def test_help_is_printed(petune: Run) -> None:
    done = petune("--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(HELP)
    lines = done.out.removeprefix(HELP).splitlines()
    assert [line.split()[0] for line in lines] == COMMANDS
    assert [line for line in lines if len(line.split()) < 3] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, petune: Run) -> None:
    done = petune(command, "-h")
    assert done.code == 0
    assert f"Usage: petune {command} " in done.out
    assert done.err == ""


def test_every_option_has_help_text() -> None:
    missing = []
    commands = dict(typer.main.get_command(program.app).commands)  # type: ignore[attr-defined]
    for group in ("data", "plugin"):
        commands |= {f"{group} {name}": command for name, command in commands.pop(group).commands.items()}
    for name, command in commands.items():
        assert command.help, name
        missing += [(name, p.name) for p in command.params if p.param_type_name == "option" and not p.help]
    assert missing == []


def test_help_shows_arguments_by_name_without_python_types(petune: Run) -> None:
    for command in COMMANDS:
        lines = petune(command, "--help").out.splitlines()
        shown = [line for line in lines if line.startswith(("Usage:", "  -", "  DIR", "  METHOD", "  REPO"))]
        assert [
            line for line in shown if re.search(r"[<{]|(?<!-)\b(str|int|float|path|INT|FLOAT)\b[>}]?", line[:35])
        ] == []
    assert "Usage: petune compare [OPTIONS] [METHOD...]\n" in petune("compare", "--help").out
    predict = petune("predict", "--help").out
    assert "Usage: petune predict [OPTIONS] DIR IMAGE...\n" in predict
    assert "  IMAGE...  Images, or videos" in predict
    assert "Usage: petune pull [OPTIONS] REPO [DIR]\n" in petune("pull", "--help").out
    assert "  --lr NUMBER " in petune("run", "--help").out


def test_version_is_printed(petune: Run) -> None:
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


def test_python_m_petune_is_the_program() -> None:
    done = subprocess.run([sys.executable, "-m", "petune", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: petune [OPTIONS] COMMAND")


def test_without_a_command_help_is_printed(petune: Run) -> None:
    done = petune()
    assert done.code == 2
    assert "Commands:" in done.out + done.err


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (("rum",), "'run'"),
        (("train",), "Did you mean 'run'?"),
        (("fit", "--epochs", 3), "Did you mean 'run'?"),
        (("finetune",), "Did you mean 'run'?"),
        (("Fine-tune",), "Did you mean 'run'?"),
        (("classify", "runs/x"), "Did you mean 'predict'?"),
        (("evaluate", "runs/x"), "'eval'?"),
        (("run", "--epoch", 3), "--epochs"),
        (("run", "--epochs", "many"), "'--epochs'"),
    ],
)
def test_usage_errors_exit_with_2_and_suggest(words: tuple[str, ...], suggestion: str, petune: Run) -> None:
    done = petune(*words)
    assert (done.code, done.out) == (2, "")
    assert suggestion in done.err
    assert "pretrain" not in done.err


ERRORS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.PetuneError)]


@pytest.mark.parametrize("kind", [e for e in ERRORS if e not in (errors.UnknownName, errors.MissingExtra)])
def test_an_error_is_one_message_with_its_exit_code(
    kind: type[errors.PetuneError], petune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_with(monkeypatch, kind("two problems:\n  - one\n  - two"))
    done = petune("env")
    assert (done.code, done.out, done.err) == (kind.exit_code, "", "error: two problems:\n  - one\n  - two\n")


@pytest.mark.parametrize(
    ("message", "printed"),
    [("lr is 0", "error: lr is 0. See --help\n"), ("why is lr 0?", "error: why is lr 0? See --help\n")],
)
def test_the_hint_for_the_command_line_follows_the_message(
    message: str, printed: str, petune: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_with(monkeypatch, errors.ConfigError(message, cli_hint="See --help"))
    assert petune("env").err == printed


@pytest.mark.parametrize("words", [("--debug", "env"), ("env", "--debug")])
def test_debug_prints_the_traceback(words: tuple[str, ...], petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(monkeypatch, errors.DataError("broken"))
    done = petune(*words)
    assert done.code == 4
    assert done.err.startswith("Traceback (most recent call last):")
    assert done.err.endswith("\nerror: broken\n")


def test_an_unexpected_error_is_called_a_bug(petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(monkeypatch, KeyError("x"))
    done = petune("env")
    expected = "error: this is a bug in petune: KeyError: 'x'. Rerun with --debug for the traceback\n"
    assert (done.code, done.out, done.err) == (1, "", expected)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), ": CUDA out of memory. Tried"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "DefaultCPUAllocator"),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "MPS allocated: 9 GB)"),
    ],
)
def test_out_of_memory_is_one_line(error: Exception, reason: str, petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(monkeypatch, error)
    done = petune("env")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: out of memory")
    assert reason in done.err
    assert len(done.err.splitlines()) == 1


def test_an_error_that_only_mentions_memory_is_still_a_bug(petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(monkeypatch, ValueError("can't allocate memory"))
    assert "this is a bug in petune" in petune("env").err


def test_ctrl_c_exits_with_130(petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(monkeypatch, KeyboardInterrupt())
    assert petune("env").code == 130


def test_control_characters_do_not_reach_the_terminal(petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(monkeypatch, errors.DataError("class \x1b[31mred\x1b[0m\x07 and \u202etxt.exe"))
    assert petune("env").err == "error: class [31mred[0m and txt.exe\n"


def _fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `petune env` raise `error`."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("petune.cli.env.environment", fail)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_sigterm_during_imports_exits_with_75(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "petune", "run", "--method=linear", "--backbone=vit_nano", "--dataset=digits"]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text() and process.poll() is None:
        time.sleep(0.005)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped by SIGTERM" in err


@pytest.mark.exhaustive
@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_characters_that_the_terminal_cannot_encode_are_replaced(encoding: str, tmp_path: Path) -> None:
    for name in ("кот", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    words = [sys.executable, "-m", "petune", "data", "check", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (4, b"")
    assert b"| ???   |" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("command", "target", "code", "message"),
    [
        ("methods", "/dev/full", 1, "error: cannot write to stdout: no space left on device\n"),
        ("--help", "/dev/full", 1, "error: cannot write to stdout: no space left on device\n"),
        ("env", "&-", 2, "error: stdout is closed. Redirect it to a file, or to /dev/null\n"),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_unwritable_stdout_is_a_one_line_error(
    unbuffered: str, command: str, target: str, code: int, message: str
) -> None:
    line = f"{sys.executable} -m petune {command} >{target}"
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (code, message)


def test_messages_for_a_closed_stderr_do_not_go_to_stdout() -> None:
    line = f"{sys.executable} -m petune methods --json 2>&-"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[")
    done = subprocess.run(line.replace("--json", "zzz"), shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_wrong_names_are_refused_with_a_suggestion_before_heavy_imports(tmp_path: Path) -> None:
    (tmp_path / "runs" / "photos").mkdir(parents=True)
    code = """if True:
        import sys
        from petune.cli.main import main
        try:
            main(sys.argv[1:])
        finally:
            print("torch" in sys.modules)
    """
    for words, message in (
        (("run", "--method", "adaptfomer"), "no such method: adaptfomer. Did you mean adaptformer"),
        (("compare", "linear", "adaptfomer"), "Did you mean adaptformer"),
        (("sweep", "adaptfomer"), "Did you mean adaptformer"),
        (("eval", "runs/phots"), "no run or adapter directory at runs/phots. Did you mean runs/photos?"),
        (("export", "runs/phots", "x.onnx"), "Did you mean runs/photos?"),
        (("predict", "runs/phots", "x.png"), "Did you mean runs/photos?"),
        (("run", "--learning-rate", "1e-3"), "No such option: --learning-rate. Did you mean --lr?"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
        assert message in done.stderr
        assert done.stdout == "False\n"
