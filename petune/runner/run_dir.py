"""A run directory belongs to one process at a time, and to one configuration for ever."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from petune.base.config import Config
from petune.base.errors import ConfigError, UsageError
from petune.base.files import replace_file, try_lock
from petune.base.yaml_values import read_yaml
from petune.data.manifest import MANIFEST_FILE
from petune.training.run_files import METRICS_FILE

CONFIG_FILE = "config.yaml"
RESULT_FILE = "result.json"
COMPARE_FILE = "compare.yaml"
"""A comparison as it was asked for last; `config.yaml` beside it holds what all its runs share."""
COMPARE_TABLE, SWEEP_TABLE, TRIAL_FILE = "compare.json", "sweep.json", "trial.json"
LOCK_FILE = ".lock"
INPUTS_FILE = "inputs.json"
BEFORE_IT_BEGINS = {CONFIG_FILE, LOCK_FILE, INPUTS_FILE, MANIFEST_FILE}
"""What a run that failed before its first step leaves: nothing worth keeping."""
UNCOMPARED = {"output", "resume", "train.eval_batch_size"}
"""What a run may go on without: where it lies, and how many images are evaluated at a time, which may not fit."""


def noted(file: Path) -> dict[str, Any]:
    """What a directory noted of its beginning; empty where it is new, or was begun by a petune that noted nothing."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def note(file: Path, what: Mapping[str, Any]) -> None:
    """Write what `noted` reads.

    Raises:
        CheckpointError: It cannot be written.
    """
    replace_file(file, (json.dumps(what, indent=1) + "\n").encode())


@contextmanager
def open_run_dir(
    path: Path, config: Config, *, resume: bool, command: str, tables: Collection[str] = ()
) -> Iterator[Path]:
    """Make `path` and hold it, or go on in it. An empty directory is as good as none.

    Args:
        path: The directory.
        config: Written as `config.yaml`; a directory to go on in must hold an equal one, if anything has trained in it.
        resume: Whether an existing directory may be gone on in.
        command: Stands on top of `config.yaml`.
        tables: Files that tell of the runs in it; with another configuration none of them is kept, either.

    Raises:
        UsageError: It exists (without `resume`), holds another configuration, or another process holds it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
        except FileExistsError:
            if not resume and any(p.name != LOCK_FILE for p in path.iterdir()):  # it was killed as it began
                raise UsageError(
                    f"{path} exists already; go on in it with --resume, or name another --output"
                ) from None
        ours = (path / LOCK_FILE).exists()
        lock = (path / LOCK_FILE).open("w")
    except OSError as error:
        raise UsageError(f"the run directory {path} cannot be made or written: {error.strerror}") from None
    with lock:
        if not try_lock(lock):
            raise UsageError(f"{path} is in use by another petune process; name another --output")
        fresh = not (path / CONFIG_FILE).exists()
        try:
            if ours and not fresh and not _has_trained(path):
                _begin_anew(path, config, tables)
            _keep_config(path, config, command)
            if not fresh:
                _remove_stumps(path)
            yield path
        except BaseException:
            if fresh and {p.name for p in path.iterdir()} <= BEFORE_IT_BEGINS:
                shutil.rmtree(path, ignore_errors=True)
            raise


def _begin_anew(path: Path, config: Config, tables: Collection[str]) -> None:
    """Take away what binds a directory in which nothing has trained to the images and options of then."""
    told = (CONFIG_FILE, *tables) if _changes(path, config) else ()
    for name in (INPUTS_FILE, MANIFEST_FILE, *told):
        (path / name).unlink(missing_ok=True)


def _remove_stumps(path: Path) -> None:
    """Take away what a killed process was writing (see `write_directory`); the lock is held, so nobody writes now."""
    for pattern in (".adapter-????????", "checkpoints/.step-?????????-????????"):
        for stump in path.glob(pattern):
            shutil.rmtree(stump, ignore_errors=True)


def unique_path(wanted: Path) -> Path:
    """Make and return `wanted`, or the first of `wanted-2`, `wanted-3`, … that does not exist.

    Raises:
        UsageError: It cannot be made.
    """
    candidate, number = wanted, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = wanted.with_name(f"{wanted.name}-{number}")
        except OSError as error:
            raise UsageError(f"the run directory {candidate} cannot be made: {error.strerror}") from None


def latest_path(wanted: Path) -> Path | None:
    """The run of `wanted`, `wanted-2`, `wanted-3`, … that began last, whichever of them are gone."""

    def began(file: Path) -> tuple[int, int]:
        return file.stat().st_mtime_ns, int(file.parent.name.removeprefix(wanted.name)[1:] or 1)

    name = re.compile(re.escape(wanted.name) + "(-[0-9]+)?")
    files = [file for file in wanted.parent.glob(f"*/{CONFIG_FILE}") if name.fullmatch(file.parent.name)]
    return max(files, key=began).parent if files else None


def why_no_adapter(path: Path) -> str:
    """What a directory is that was taken for a finished run, and what to do."""
    config = path / CONFIG_FILE
    for table, what in ((COMPARE_TABLE, "comparison"), (SWEEP_TABLE, "sweep")):
        if (path / table).exists():
            runs = ", ".join(sorted(str(file.parent) for file in path.glob(f"*/{RESULT_FILE}")))
            return f"{path} is a {what}, whose runs have adapters; name one that is finished: {runs or 'none is'}"
    if (path / RESULT_FILE).exists():
        return f"{path} is a run without an adapter; a pretraining is for --weights"
    if (path / TRIAL_FILE).exists():
        return f"{path} is a trial that did not read test, and has no adapter; run it: petune run --config {config}"
    if config.exists():
        again = f"petune run --config {config} --output {path} --resume"
        return f"{path} is a run that is not finished; go on: {again}"
    if not path.exists():
        return f"an adapter directory must be there, but there is no {path}"
    return f"{path} must be an adapter directory, but holds no adapter_config.json"


def check_config(path: Path, config: Config) -> None:
    """Hold that what has trained in a directory, if anything has, was asked for as `config` asks.

    Raises:
        UsageError: It was not; with every value that differs.
    """
    if (path / CONFIG_FILE).exists() and _has_trained(path):
        _refuse(path, _changes(path, config))


def _has_trained(path: Path) -> bool:
    """Whether anything is there that took time: every run has directories of its own, and so has what holds runs."""
    return any(p.is_dir() or p.name in (RESULT_FILE, METRICS_FILE) for p in path.iterdir())


def _keep_config(path: Path, config: Config, command: str) -> None:
    if (path / CONFIG_FILE).exists():
        return _refuse(path, _changes(path, config))
    fields = type(config).model_fields
    asked = config.model_copy(update={key: fields[key].default for key in UNCOMPARED & fields.keys()})
    return replace_file(path / CONFIG_FILE, f"# {command}\n{asked.to_yaml()}".encode())


def _changes(path: Path, config: Config) -> list[str]:
    """What differs between the configuration in a directory and this one."""
    before = leaves(_filled(read_yaml(path / CONFIG_FILE), type(config)))
    now = leaves(config.model_dump(mode="json"))
    keys = sorted({*before, *now} - UNCOMPARED)
    return [f"{k}: {before.get(k)!r} before, {now.get(k)!r} now" for k in keys if before.get(k) != now.get(k)]


def _refuse(path: Path, changed: list[str]) -> None:
    if changed:
        raise UsageError(
            f"{path} holds a run with another configuration; a run goes on only as it began:\n  - "
            + "\n  - ".join(changed)
            + "\nAsk for the same again, or name another --output"
        )


def leaves(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` → `{"train.lr": 1}`; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {above + key: value}
    return found


def _filled(values: dict[str, Any], kind: type[Config]) -> dict[str, Any]:
    """The values with the defaults of options that petune did not have when they were written."""
    try:
        return kind.build(values).model_dump(mode="json")
    except ConfigError:
        return values
