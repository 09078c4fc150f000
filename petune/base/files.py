"""Write files and directories completely or not at all: written under a hidden name, synced, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import IO, Any

from petune.base.errors import CheckpointError, similar_names

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
IS_LOCKED = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
HAS_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of file systems without locks: NFS without a lock service, Lustre without `-o flock`, some FUSE and SMB."""


def write_directory(path: Path, files: Mapping[str, bytes | Callable[[], bytes]]) -> None:
    """Write `files` as the directory `path`, replacing it; on an error it stays as it was.

    Args:
        path: The directory; its parent is created.
        files: Content by file name (no folders), or a function that returns it: then one is in memory at a time.

    Raises:
        CheckpointError: The disk is full or read-only, or permission is missing.
    """
    entries: dict[str, dict[str, Any]] = {}
    temporary: Path | None = None
    path = path.resolve() if path.is_symlink() else path  # what the link names is replaced, not the link
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        for name, content in files.items():
            entries[name] = _write_and_describe(temporary / name, _bytes_of(content))
        _write_synced(temporary / MANIFEST, _manifest(entries))
        _replace_directory(temporary, path)
    except OSError as error:
        raise _cannot_write(path, sum(len(_bytes_of(content)) for content in files.values()), error) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def no_directory_at(path: Path) -> str:
    """Return the message for a run or adapter directory that does not exist, with similar names next to it."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        names = []
    similar = [str(path.parent / name) for name in similar_names(path.name, names, cutoff=0.6)]
    return f"no run or adapter directory at {path}" + (f". Did you mean {' or '.join(similar)}?" if similar else "")


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path`, replacing it; on an error it stays as it was. Its folder is created.

    Raises:
        CheckpointError: It cannot be written.
    """
    writer = f"{os.getpid()}-{threading.get_ident()}"  # two may write the same file at once
    temporary = path.with_name(f".{path.name[:100]}.{writer}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(temporary, content)
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, len(content), error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a place to write a file to, which becomes `path` at the end; on an error or a kill, `path` gets no part.

    Raises:
        OSError: The folder of `path` is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:  # another process may do the same
        temporary = Path(folder) / path.name
        yield temporary
        temporary.replace(path)


def append(path: Path, content: bytes) -> int:
    """Append `content` to the file `path` and return the file's size in bytes.

    Raises:
        CheckpointError: It cannot be written; a part of `content` may have been.
    """
    try:
        with path.open("ab") as file:
            file.write(content)
            return file.tell()
    except OSError as error:
        raise _cannot_write(path, len(content), error) from None


def truncate(path: Path, size: int) -> None:
    """Keep only the first `size` bytes of the file, if it exists.

    Raises:
        CheckpointError: It cannot be written.
    """
    try:
        if path.exists():
            os.truncate(path, min(size, path.stat().st_size))
    except OSError as error:
        raise _cannot_write(path, 0, error) from None


class Lock(Enum):
    """Result of locking a file: it is locked now, another process holds the lock, or there are no file locks."""

    LOCKED = "locked"
    BUSY = "busy"
    UNAVAILABLE = "unavailable"


def try_lock(file: IO[str]) -> Lock:
    """Lock an open file until it is closed.

    Without file locks (Windows, some network file systems) a warning is shown.

    Raises:
        CheckpointError: The file system reports another error.
    """
    if fcntl is None:
        warnings.warn("this system has no file locks: run one petune process per directory", stacklevel=2)
        return Lock.UNAVAILABLE
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in IS_LOCKED:
            return Lock.BUSY
        if error.errno not in HAS_NO_LOCKS:
            raise CheckpointError(f"cannot lock {file.name}: {error.strerror}. Use another directory") from None
        warnings.warn(
            f"the file system of {file.name} has no file locks ({error.strerror}): run one petune process per "
            "directory, or use a directory on a local disk",
            stacklevel=2,
        )
        return Lock.UNAVAILABLE
    return Lock.LOCKED


def verify_directory(path: Path, *, except_for: Collection[str] = ()) -> None:
    """Check the files listed in the manifest of `path`.

    Args:
        path: A directory written by `write_directory`.
        except_for: Files that users may edit or delete.

    Raises:
        CheckpointError: The manifest or a file is missing, or a size or SHA-256 differs.
    """
    try:
        entries = json.loads((path / MANIFEST).read_bytes())["files"]
        expected = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path / MANIFEST} is missing or damaged") from None
    for name, (size, digest) in expected.items():
        if name in except_for:
            continue
        file = path / Path(name).name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        content = file.read_bytes()
        if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
            raise CheckpointError(f"{file} is damaged: it has {len(content):,} bytes of {size:,}, or another SHA-256")


def write_manifest(path: Path, names: Sequence[str]) -> None:
    """Write the manifest for files that another library has written into the directory."""
    replace_file(path / MANIFEST, manifest_bytes({name: (path / name).read_bytes() for name in names}))


def manifest_bytes(files: Mapping[str, bytes]) -> bytes:
    """Return sizes and SHA-256 of files by name, as JSON that `verify_directory` reads."""
    return _manifest({name: _entry(content) for name, content in files.items()})


def _manifest(entries: Mapping[str, Mapping[str, Any]]) -> bytes:
    return json.dumps({"format": 1, "files": entries}, indent=1).encode()


def _entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _bytes_of(content: bytes | Callable[[], bytes]) -> bytes:
    return content() if callable(content) else content


def _cannot_write(path: Path, num_bytes: int, error: OSError) -> CheckpointError:
    unchanged = ". The previous version is unchanged" if path.exists() else ""
    if error.errno in IS_FULL:
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        size = f"needs {num_bytes:,} bytes, {free:,} are free"
        reason = f"{error.strerror} ({size}){unchanged}. Free some space, or choose"
    else:
        file = file_in_path(path)
        reason = f"{f'{file} is not a directory' if file else error.strerror or error}{unchanged}. Choose"
    return CheckpointError(f"cannot write {path}: {reason} another directory")


def file_in_path(path: Path) -> Path | None:
    """Return the parent of a path that is a file where a directory has to be; None if there is none."""
    return next((parent for parent in path.parents if os.path.lexists(parent) and not parent.is_dir()), None)


def _write_and_describe(path: Path, content: bytes) -> dict[str, Any]:
    _write_synced(path, content)
    return _entry(content)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _replace_directory(new: Path, path: Path) -> None:
    os.chmod(new, 0o755)
    if not exchange_directories(new, path):
        old = new.with_name(f"{new.name}-old")
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    if hasattr(os, "O_DIRECTORY"):  # not on Windows, which cannot open directories
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def exchange_directories(new: Path, path: Path) -> bool:
    """Swap two directories atomically; return false if that is not possible here.

    Only Linux can (renameat2 with RENAME_EXCHANGE, not in Python's os). Elsewhere two renames are used, and a kill
    between them leaves no directory at `path`, only the previous one under a hidden name.
    """
    if not path.is_dir() or path.is_symlink():
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_fdcwd, exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(path), exchange) == 0)
