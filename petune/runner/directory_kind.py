"""Which command made a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from petune.runner.file_names import COMPARE_TABLE, CONFIG_FILE, RESULT_FILE, SWEEP_TABLE, TRIAL_FILE

Kind = Literal["run", "pretrain", "trial", "compare", "sweep"]
TABLES: dict[Kind, str] = {"compare": COMPARE_TABLE, "sweep": SWEEP_TABLE}


def kind_of(path: Path) -> Kind:
    """Return which command made a directory; `trial` is a run of a sweep that was not tested."""
    for kind, table in TABLES.items():
        if (path / table).exists():
            return kind
    if (path / TRIAL_FILE).exists() and not (path / RESULT_FILE).exists():
        return "trial"
    commands: tuple[Kind, ...] = ("pretrain", "compare", "sweep")
    return next((kind for kind in commands if kind == _command(path)), "run")


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
        return f"{path} is a run without an adapter. A pretraining is used with --weights"
    if (path / TRIAL_FILE).exists():
        return f"{path} is a trial that was not tested and has no adapter. Run it: petune run --config {config_file}"
    if config_file.exists():
        again = f"petune run --config {config_file} --output {path} --resume"
        return f"{path} is a run that is not finished. Continue it: {again}"
    if not path.exists():
        return f"no run or adapter directory at {path}"
    return f"no adapter in {path}: adapter_config.json is missing"
