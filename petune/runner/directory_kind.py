"""Find out which command made a directory, and explain one that has no adapter."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Literal

from petune.adapters.format import CONFIG_FILE as ADAPTER_FILE
from petune.base.errors import MAX_LISTED, UsageError
from petune.base.files import no_directory_at
from petune.runner.file_names import COMPARE_TABLE, CONFIG_FILE, RESULT_FILE, SWEEP_TABLE, TRIAL_FILE

Kind = Literal["run", "pretrain", "trial", "compare", "sweep"]
TABLES: dict[Kind, str] = {"compare": COMPARE_TABLE, "sweep": SWEEP_TABLE}
NOUNS = {"run": "run", "pretrain": "pretraining", "compare": "comparison", "sweep": "sweep"}
"""What each command makes."""


def kind_of(path: Path) -> Kind:
    """Return which command made a directory; `trial` is a run of a sweep that was not tested."""
    for kind, table in TABLES.items():
        if (path / table).exists():
            return kind
    if (path / TRIAL_FILE).exists() and not (path / RESULT_FILE).exists():
        return "trial"
    commands: tuple[Kind, ...] = ("pretrain", "compare", "sweep")
    return next((kind for kind in commands if kind == _command(path)), "run")


def check_kind(path: Path, command: str) -> None:
    """Check that another command has not made a directory.

    Args:
        path: May be missing.
        command: The command that is to work there, such as `run`.

    Raises:
        UsageError: Another one has; the message says which, and how to continue there.
    """
    kind = kind_of(path)
    maker = "run" if kind == "trial" else kind
    if maker == command or (maker == "run" and _command(path) != "run"):
        return
    flags = ["--resume"] if maker in {"run", "pretrain"} else []
    again = shlex.join(["petune", maker, "--config", str(path / CONFIG_FILE), "--output", str(path), *flags])
    raise UsageError(f"{path} is a {NOUNS[maker]}, not a {NOUNS[command]}. Use another output, or continue it: {again}")


def _command(path: Path) -> str:
    """Return the command in the first line of `config.yaml`: `# petune sweep --config config.yaml`."""
    try:
        with (path / CONFIG_FILE).open(encoding="utf-8", errors="replace") as file:
            words = file.readline(200).split()
    except OSError:
        return ""
    return words[2] if words[1:2] == ["petune"] and len(words) > 2 else ""


def explain_missing_adapter(path: Path) -> str:
    """Say what a directory is that has no adapter, and what to do."""
    config_file = path / CONFIG_FILE
    for table, kind in ((COMPARE_TABLE, "comparison"), (SWEEP_TABLE, "sweep")):
        if (path / table).exists():
            runs = ", ".join(sorted(str(file.parent) for file in path.glob(f"*/{RESULT_FILE}")))
            return f"{path} is a {kind}; its runs have the adapters. Name one that is finished: {runs or 'none is'}"
    if (path / RESULT_FILE).exists():
        return f"{path} is a run without an adapter. A pretraining is used with petune run --weights {path}"
    if (path / TRIAL_FILE).exists():
        return f"{path} is a trial that was not tested and has no adapter. Run it: petune run --config {config_file}"
    if config_file.exists():
        again = f"petune run --config {config_file} --output {path} --resume"
        return f"{path} is a run that is not finished. Continue it: {again}"
    if not path.exists():
        return no_directory_at(path)
    if path.is_file():
        return f"{path} is a file, not a run or adapter directory. Give the directory first, then any other files"
    inside = runs_with_adapters(path)
    if inside:
        listed = "".join(f"\n  {run}" for run in inside[:MAX_LISTED]) + ("\n  …" if len(inside) > MAX_LISTED else "")
        return f"{path} is not a run itself. Name one of the runs in it:{listed}"
    return f"no adapter in {path}: adapter_config.json is missing, and no finished run is in it"


def runs_with_adapters(path: Path) -> list[Path]:
    """Return the run and adapter directories up to two levels below a directory, the newest first."""
    levels = ("*", "*/*", "*/*/*")  # the last one is the adapter directory of a run two levels below
    files = [file for level in levels for file in path.glob(f"{level}/{ADAPTER_FILE}")]
    newest_first = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)
    return [_run_of(file.parent) for file in newest_first if _run_of(file.parent) != path]


def _run_of(adapter: Path) -> Path:
    """Return the directory of the run that saved an adapter, or the adapter itself if it is in no run."""
    return adapter.parent if adapter.name == "adapter" and (adapter.parent / CONFIG_FILE).is_file() else adapter
