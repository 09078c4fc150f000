"""Run directories: locked while in use, and kept to one configuration once training has started."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from petune.base.config import Config
from petune.base.errors import UsageError
from petune.base.files import Lock, replace_file, try_lock
from petune.runner.directory_kind import check_kind
from petune.runner.file_names import CONFIG_FILE, FINAL_FIT_DIR, INPUTS_FILE, LOCK_FILE, MANIFEST_FILE, SPLITS_FILE
from petune.runner.migrations import migrate_run_dir
from petune.runner.stored_config import changed_values, has_trained, refuse_changes, write_config

WRITTEN_BEFORE_TRAINING = {CONFIG_FILE, LOCK_FILE, INPUTS_FILE, MANIFEST_FILE, SPLITS_FILE}
"""Files of a run that failed before its first step; none of them is worth keeping."""
PARTIAL_CHECKPOINTS = "checkpoints/.step-?????????-????????"
PARTIAL_WRITES = (".adapter-????????", PARTIAL_CHECKPOINTS, f"{FINAL_FIT_DIR}/{PARTIAL_CHECKPOINTS}")
"""Directories that `petune.base.files.write_directory` was writing when its process was killed."""
NEW_OUTPUT = "Name a new directory with --output"


@contextmanager
def open_run_dir(
    run_dir: Path,
    config: Config,
    *,
    resume: bool,
    command: str,
    may_change: Collection[str] = (),
    tables: Collection[str] = (),
) -> Iterator[Path]:
    """Create a run directory, or open an existing one to continue in it, and lock it.

    An empty directory counts as new. If nothing has trained in a directory yet, another configuration replaces the
    one in it. A run that fails before its first step leaves nothing.

    Args:
        run_dir: The directory.
        config: Written to `config.yaml`; an existing directory must hold an equal one.
        resume: Accept an existing directory.
        command: The command that `config` is for, such as `run`.
        may_change: Top-level keys of `config` that need not be the same.
        tables: Files that describe the runs inside; removed when another configuration replaces the old one.

    Raises:
        UsageError: It exists (without `resume`), holds another configuration, or another process uses it.
    """
    parents = [parent for parent in run_dir.parents if not parent.exists()]
    made_by_petune, lock_file = _create(run_dir, resume)
    with lock_file:
        _lock(run_dir, lock_file, created=not made_by_petune, resume=resume)
        migrate_run_dir(run_dir)
        is_new = not (run_dir / CONFIG_FILE).exists()
        try:
            if made_by_petune and not is_new and not has_trained(run_dir):
                _start_over(run_dir, config, may_change, tables)
            if (run_dir / CONFIG_FILE).exists():
                refuse_changes(run_dir, config, may_change)
            else:
                write_config(run_dir, config, command)
            if not is_new:
                _remove_partial_writes(run_dir)
            yield run_dir
        except BaseException:
            if is_new and {path.name for path in run_dir.iterdir()} <= WRITTEN_BEFORE_TRAINING:
                shutil.rmtree(run_dir, ignore_errors=True)
                _remove_empty(parents)
            raise


def _remove_empty(directories: Sequence[Path]) -> None:
    """Remove directories, each inside the next one, up to the first one that holds something."""
    with suppress(OSError):
        for directory in directories:
            directory.rmdir()


def check_run_dir(
    run_dir: Path, config: Config, *, resume: bool, command: str, may_change: Collection[str] = ()
) -> None:
    """Check that `open_run_dir` would accept a directory, and write nothing.

    Args:
        run_dir: The directory; may be missing.
        config, resume, command, may_change: See `open_run_dir`.

    Raises:
        UsageError: It exists (without `resume`), holds another configuration, or is the work of another command.
    """
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir} is a file. Use another output", cli_hint=NEW_OUTPUT)
    check_kind(run_dir, command)
    if not resume and any(path.name != LOCK_FILE for path in run_dir.iterdir()):
        raise _already_exists(run_dir)
    starts_over = (run_dir / LOCK_FILE).exists() and not has_trained(run_dir)
    if (run_dir / CONFIG_FILE).exists() and not starts_over:
        refuse_changes(run_dir, config, may_change)


def _already_exists(run_dir: Path) -> UsageError:
    return UsageError(
        f"{run_dir} already exists. Resume it, or use another output",
        cli_hint="Add --resume, or name a new directory with --output",
    )


def _lock(run_dir: Path, lock_file: IO[str], *, created: bool, resume: bool) -> None:
    """Lock a run directory. Without file locks, only the process that created the lock file starts a run there."""
    lock = try_lock(lock_file)
    if lock is Lock.BUSY:
        raise UsageError(f"{run_dir} is in use by another petune process", cli_hint=NEW_OUTPUT)
    if lock is Lock.UNAVAILABLE and not created and not resume:
        raise UsageError(
            f"{run_dir} is in use by another petune process, or one was killed there as it started. If none is "
            f"running, delete {lock_file.name}",
            cli_hint=NEW_OUTPUT,
        )


def _create(run_dir: Path, resume: bool) -> tuple[bool, IO[str]]:
    """Create the directory and its lock file; return whether the lock file existed, and the open file."""
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        try:
            run_dir.mkdir()
        except FileExistsError:
            # a process that was killed as it started leaves a lock file only
            if not resume and any(path.name != LOCK_FILE for path in run_dir.iterdir()):
                raise _already_exists(run_dir) from None
        try:
            return False, (run_dir / LOCK_FILE).open("x")
        except FileExistsError:
            return True, (run_dir / LOCK_FILE).open("w")
    except OSError as error:
        raise UsageError(f"cannot create or write the run directory {run_dir}: {error.strerror}") from None


def _start_over(run_dir: Path, config: Config, may_change: Collection[str], tables: Collection[str]) -> None:
    """Remove the records of earlier inputs, and of a different configuration, from a directory without training."""
    outdated = (CONFIG_FILE, *tables) if changed_values(run_dir, config, may_change) else ()
    for name in (INPUTS_FILE, MANIFEST_FILE, SPLITS_FILE, *outdated):
        (run_dir / name).unlink(missing_ok=True)


def _remove_partial_writes(run_dir: Path) -> None:
    for pattern in PARTIAL_WRITES:
        for path in run_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write what `petune.runner.migrations.read_record` reads.

    Raises:
        CheckpointError: It cannot be written.
    """
    replace_file(file, (json.dumps(record, indent=1) + "\n").encode())


def make_unique_dir(wanted: Path) -> Path:
    """Create and return `wanted`, or the first of `wanted-2`, `wanted-3`, … that does not exist.

    Raises:
        UsageError: It cannot be created.
    """
    path = wanted
    number = 1
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")
        except OSError as error:
            raise UsageError(f"cannot create the run directory {path}: {error.strerror}") from None


def latest_path(wanted: Path) -> Path | None:
    """Return the run of `wanted`, `wanted-2`, `wanted-3`, … that was started last; None if there is none."""

    def start(config_file: Path) -> tuple[int, int]:
        suffix = config_file.parent.name.removeprefix(wanted.name)[1:]
        return config_file.stat().st_mtime_ns, int(suffix or 1)

    name = re.compile(re.escape(wanted.name) + "(-[0-9]+)?")
    config_files = [file for file in wanted.parent.glob(f"*/{CONFIG_FILE}") if name.fullmatch(file.parent.name)]
    return max(config_files, key=start).parent if config_files else None
