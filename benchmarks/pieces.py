"""Carry files to a machine that takes a limited number of bytes at a time.

Each piece is a folder with a part of all the bytes and the list of files, so pieces can arrive in any order.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CONTENTS, DATA = "contents.json", "data"
MIB = 2**20


def write_pieces(files: Mapping[str, Path], folder: Path, limit_bytes: int) -> list[Path]:
    """Cut files into pieces, which replace those of an earlier split.

    Args:
        files: By the path that each gets on the other machine.
        folder: Gets `piece-1`, `piece-2` and so on.
        limit_bytes: Largest size of a piece, without its list of files.

    Returns:
        The pieces in order.

    Raises:
        SystemExit: A file is missing, or the folder holds anything but pieces.
    """
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise SystemExit(f"there is no {', '.join(missing)}. Name the folder that has them")
    earlier = _earlier_pieces(folder, files.values())
    contents = [{"path": name, "bytes": path.stat().st_size, "sha256": _digest(path)} for name, path in files.items()]
    count = max(1, -(-sum(path.stat().st_size for path in files.values()) // limit_bytes))
    for piece in earlier:
        shutil.rmtree(piece)
    pieces = [folder / f"piece-{number}" for number in range(1, count + 1)]
    for number, piece in enumerate(pieces, 1):
        piece.mkdir(parents=True)
        (piece / CONTENTS).write_text(json.dumps({"piece": number, "pieces": count, "files": contents}, indent=1))
    with _Parts(pieces, limit_bytes) as parts:
        for path in files.values():
            with path.open("rb") as source:
                while block := source.read(MIB):
                    parts.write(block)
    return pieces


def _earlier_pieces(folder: Path, sources: Iterable[Path]) -> list[Path]:
    """Return the pieces in a folder, which may hold nothing else."""
    found = sorted(folder.iterdir()) if folder.exists() else []
    others = [path.name for path in found if not _is_piece(path)]
    if others:
        raise SystemExit(f"{folder} holds {', '.join(others)}, which no split wrote. Choose another folder with --to")
    if inside := [str(path) for path in sources if path.resolve().is_relative_to(folder.resolve())]:
        raise SystemExit(f"{folder} holds {', '.join(inside)}, which is to be split. Choose another folder with --to")
    return found


def _is_piece(path: Path) -> bool:
    is_named_so = re.fullmatch(r"piece-\d+", path.name) is not None and path.is_dir() and not path.is_symlink()
    return is_named_so and {inner.name for inner in path.iterdir()} <= {CONTENTS, DATA}


class _Parts:
    """Writes a stream of bytes into `data` of one piece after the other."""

    def __init__(self, pieces: list[Path], limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.files = [(piece / DATA).open("wb") for piece in pieces]
        self.written = 0

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()

    def write(self, block: bytes) -> None:
        while block:
            number, offset = divmod(self.written, self.limit_bytes)
            fitting = block[: self.limit_bytes - offset]
            self.files[number].write(fitting)
            self.written += len(fitting)
            block = block[len(fitting) :]


def join_pieces(folder: Path, target: Path) -> list[Path]:
    """Put the files together below `target`, unless they are there; return them.

    Raises:
        SystemExit: Pieces are missing, damaged, or of different files.
    """
    lists = {path.parent: json.loads(path.read_text()) for path in sorted(folder.glob(f"piece-*/{CONTENTS}"))}
    by_number = {contents["piece"]: (piece, contents) for piece, contents in lists.items()}
    if not by_number:
        raise SystemExit(f"no pieces in {folder}. Make them with: python benchmarks/seed_on_gpu.py split DATA")
    first = next(iter(by_number.values()))[1]
    if any(contents["files"] != first["files"] for _, contents in by_number.values()):
        raise SystemExit(f"{folder} has pieces of different files. Remove it and bring all pieces again")
    missing = [number for number in range(1, first["pieces"] + 1) if number not in by_number]
    if missing:
        raise SystemExit(f"{folder} has no {', '.join(f'piece-{n}' for n in missing)} of {first['pieces']}. Bring it")
    paths = [target / entry["path"] for entry in first["files"]]
    if all(path.is_file() and path.stat().st_size == e["bytes"] for path, e in zip(paths, first["files"], strict=True)):
        return paths
    content = b"".join((by_number[number][0] / DATA).read_bytes() for number in sorted(by_number))
    for path, entry in zip(paths, first["files"], strict=True):
        _write(path, content[: entry["bytes"]], entry)
        content = content[entry["bytes"] :]
    return paths


def _write(path: Path, content: bytes, entry: Mapping[str, Any]) -> None:
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise SystemExit(f"{entry['path']} is damaged: its pieces have another SHA-256. Bring all pieces again")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_bytes(content)
    temporary.replace(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
