"""Directories that are complete or not there: written aside, synced, sealed with a manifest, renamed."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from petune.base.errors import CheckpointError

MANIFEST = "manifest.json"


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Put `files` into the directory `path`, in place of what was there, or leave everything as it was.

    Args:
        path: The directory; its parent is made where it is missing.
        files: File name (no folders) to content.

    Raises:
        CheckpointError: Disk full, read-only, no permission. What was there before is still there.
    """
    need = sum(map(len, files.values()))
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        for name, content in {**files, MANIFEST: manifest_bytes(files)}.items():
            _write_synced(temporary / name, content)
        _swap_in(temporary, path)
    except OSError as error:
        raise _unwritten(path, need, error) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` at `path` in place of what was there, or leave it as it was; its folder is made if it is missing.

    Raises:
        CheckpointError: It cannot be written.
    """
    aside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(aside, content)
        os.replace(aside, path)
    except OSError as error:
        raise _unwritten(path, len(content), error) from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def append(path: Path, content: bytes) -> int:
    """Add `content` to the end of the file `path` and return its size in bytes.

    Raises:
        CheckpointError: It cannot be written; a part of `content` may be there.
    """
    try:
        with path.open("ab") as file:
            file.write(content)
            return file.tell()
    except OSError as error:
        raise _unwritten(path, len(content), error) from None


def truncate(path: Path, size: int) -> None:
    """Drop all but the first `size` bytes of the file, if there is one.

    Raises:
        CheckpointError: It cannot be written.
    """
    try:
        if path.exists():
            os.truncate(path, min(size, path.stat().st_size))
    except OSError as error:
        raise _unwritten(path, 0, error) from None


def verify_directory(path: Path, *, except_for: Collection[str] = ()) -> None:
    """Check the files of `path` that its manifest lists, but for those that users may edit or take away.

    Raises:
        CheckpointError: The manifest or a file is missing, or a size or SHA-256 differs.
    """
    try:
        entries = json.loads((path / MANIFEST).read_bytes())["files"]
        expected = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} must hold a readable {MANIFEST}; it is missing or damaged") from None
    for name, (size, digest) in expected.items():
        if name in except_for:
            continue
        file = path / Path(name).name
        if not file.is_file():
            raise CheckpointError(f"{path} must hold {name}, but it is missing")
        content = file.read_bytes()
        if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
            raise CheckpointError(
                f"{file} is damaged: {len(content):,} bytes where {size:,} were written, or another SHA-256"
            )


def write_manifest(path: Path, names: Sequence[str]) -> None:
    """Write the manifest over files that another library has written into the directory."""
    replace_file(path / MANIFEST, manifest_bytes({name: (path / name).read_bytes() for name in names}))


def _unwritten(path: Path, need: int, error: OSError) -> CheckpointError:
    have = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
    return CheckpointError(
        f"cannot write {path}: {error.strerror or error} (needs {need:,} bytes, {have:,} are free); "
        "what was there before is untouched. Make room, or name another place"
    )


def manifest_bytes(files: Mapping[str, bytes]) -> bytes:
    """Sizes and SHA-256 of files, by name, as `verify_directory` reads them."""
    entries = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    return json.dumps({"format": 1, "files": entries}, indent=1).encode()


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _swap_in(new: Path, path: Path) -> None:
    os.chmod(new, 0o755)
    if not _exchange(new, path):
        old = new.with_name(new.name + "-old")
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _exchange(new: Path, path: Path) -> bool:
    """Swap two directories in one step, so that a kill finds either; False where that cannot be done.

    Linux alone has it (renameat2 with RENAME_EXCHANGE, not in Python's os), on most file systems. Elsewhere two
    renames must do, and a kill between them leaves what was there before under a hidden name beside it.
    """
    if not path.is_dir() or path.is_symlink():
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_fdcwd, exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(path), exchange) == 0)
