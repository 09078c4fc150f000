"""Directories are written completely or not at all, and damage is detected."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from petune.base import files
from petune.base.errors import CheckpointError
from petune.base.files import MANIFEST, Lock, replace_file, try_lock, verify_directory, write_directory

CONTENT = {"a.bin": bytes(range(256)) * 4, "b.bin": bytes(reversed(range(256))) * 4, "c.json": b"{}"}


def _fails_at(number: int, monkeypatch: pytest.MonkeyPatch, name: str = "fsync") -> None:
    calls, real = [0], getattr(os, name)

    def call(*args: object) -> object:
        calls[0] += 1
        if calls[0] == number:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, name, call)


def test_a_written_directory_verifies_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_directory(tmp_path / "deep" / "x", CONTENT)
    verify_directory(tmp_path / "deep" / "x")
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"x"}
    assert {p.name for p in (tmp_path / "deep" / "x").iterdir()} == {*CONTENT, MANIFEST}
    assert {n: (tmp_path / "deep" / "x" / n).read_bytes() for n in CONTENT} == CONTENT


def test_a_second_write_replaces_the_whole_directory(tmp_path: Path) -> None:
    write_directory(tmp_path / "x", CONTENT)
    write_directory(tmp_path / "x", {"d.bin": lambda: b"new"})
    verify_directory(tmp_path / "x")
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"d.bin", MANIFEST}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_every_bit_flip_is_found(tmp_path: Path) -> None:
    write_directory(tmp_path / "x", CONTENT)
    generator = np.random.default_rng(0)
    for _ in range(200):
        file = tmp_path / "x" / list(CONTENT)[generator.integers(3)]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[generator.integers(len(bad))] ^= 1 << int(generator.integers(8))
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
            verify_directory(tmp_path / "x")
        file.write_bytes(good)
    verify_directory(tmp_path / "x")


@pytest.mark.parametrize("size", [0, 1, 1023])
def test_truncation_is_found(size: int, tmp_path: Path) -> None:
    write_directory(tmp_path / "x", CONTENT)
    os.truncate(tmp_path / "x" / "a.bin", size)
    with pytest.raises(CheckpointError, match=rf"a\.bin is damaged: it has {size:,} bytes of 1,024"):
        verify_directory(tmp_path / "x")


def test_swapped_files_of_the_same_size_are_found(tmp_path: Path) -> None:
    write_directory(tmp_path / "x", CONTENT)
    (tmp_path / "x" / "a.bin").write_bytes(CONTENT["b.bin"])
    (tmp_path / "x" / "b.bin").write_bytes(CONTENT["a.bin"])
    with pytest.raises(CheckpointError, match="damaged"):
        verify_directory(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_directory(tmp_path / "x", CONTENT)
    (tmp_path / "x" / "b.bin").unlink()
    with pytest.raises(CheckpointError, match=r"b\.bin is missing"):
        verify_directory(tmp_path / "x")


@pytest.mark.parametrize("text", ["", "[]", '{"files": [1]}', '{"files": {"a.bin": 3}}', '{"files": null}', "\x00"])
def test_a_damaged_manifest_is_an_error_not_a_crash(text: str, tmp_path: Path) -> None:
    write_directory(tmp_path / "x", CONTENT)
    (tmp_path / "x" / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify_directory(tmp_path / "x")


def test_a_manifest_cannot_reach_outside_its_directory(tmp_path: Path) -> None:
    write_directory(tmp_path / "x", CONTENT)
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"secret")
    text = (tmp_path / "x" / MANIFEST).read_text().replace('"a.bin"', '"../outside.bin"')
    (tmp_path / "x" / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="outside"):
        verify_directory(tmp_path / "x")


@pytest.mark.parametrize("number", range(1, len(CONTENT) + 2))
def test_a_full_disk_leaves_the_old_directory(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_directory(tmp_path / "x", CONTENT)
    _fails_at(number, monkeypatch)
    with pytest.raises(CheckpointError, match=r"No space left on device \(needs 9 bytes, [\d,]+ are free\)"):
        write_directory(tmp_path / "x", {"a.bin": b"abc", "b.bin": b"def", "c.json": b"ghi"})
    monkeypatch.undo()
    verify_directory(tmp_path / "x")
    assert (tmp_path / "x" / "a.bin").read_bytes() == CONTENT["a.bin"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    for path in (tmp_path / "f" / "x", tmp_path / "f" / "y" / "x"):
        with pytest.raises(CheckpointError, match="f is not a directory") as caught:
            write_directory(path, CONTENT)
        assert "space" not in str(caught.value)


@pytest.mark.parametrize("number", [1, 2])
def test_a_failed_rename_puts_the_old_directory_back(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_directory(tmp_path / "x", CONTENT)
    monkeypatch.setattr(files, "exchange_directories", lambda new, path: False)
    _fails_at(number, monkeypatch, "rename")
    with pytest.raises(CheckpointError, match="previous version is unchanged"):
        write_directory(tmp_path / "x", {"a.bin": b"abc"})
    monkeypatch.undo()
    verify_directory(tmp_path / "x")
    assert (tmp_path / "x" / "a.bin").read_bytes() == CONTENT["a.bin"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("atomic", [True, False])
def test_killed_at_any_point_leaves_a_directory_that_verifies(
    atomic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x"
    if not atomic:
        monkeypatch.setattr(files, "exchange_directories", lambda new, path: False)
    elif not sys.platform.startswith("linux"):
        pytest.skip("only Linux swaps two directories in one step")
    for point in range(1, 12):
        write_directory(target, CONTENT)
        child = os.fork()
        if child == 0:
            _die_at(point)
            write_directory(target, {"a.bin": b"n" * 10, "b.bin": b"e" * 10})
            os._exit(0)
        os.waitpid(child, 0)
        if atomic:
            assert _verifies(target), f"no directory after a kill at call {point}"
        # a kill between the two renames leaves the old directory under a hidden name
        whole = [p for p in tmp_path.iterdir() if _verifies(p)]
        assert whole, f"nothing can be loaded after a kill at call {point}"
        assert _verifies(target) or not target.exists(), f"an incomplete directory after a kill at call {point}"


def _die_at(point: int) -> None:
    calls = [0]

    def dying(real: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] == point:
                os._exit(9)
            return real(*args, **kwargs)  # type: ignore[operator]

        return call

    for name in ("fsync", "rename", "chmod", "open"):
        setattr(files.os, name, dying(getattr(os, name)))


def _verifies(path: Path) -> bool:
    try:
        verify_directory(path)
    except CheckpointError:
        return False
    return True


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "result.json"
    replace_file(file, b"old")
    _fails_at(1, monkeypatch)
    with pytest.raises(CheckpointError, match=r"cannot write .*result\.json: No space left"):
        replace_file(file, b"new")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    replace_file(file, b"new")
    assert file.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_several_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    contents = [bytes([65 + number]) * 10_000 for number in range(4)]

    def write(content: bytes) -> None:
        for _ in range(20):
            replace_file(tmp_path / "table.json", content)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, contents))
    assert (tmp_path / "table.json").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_link_to_a_directory_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    write_directory(tmp_path / "first", {"a": b"1", "b": b"2"})
    (tmp_path / "latest").symlink_to("first", target_is_directory=True)
    write_directory(tmp_path / "latest", {"a": b"3"})
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "first" / "a").read_bytes() == b"3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "latest"]
    verify_directory(tmp_path / "first")


def test_a_path_that_cannot_be_a_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_directory(tmp_path / "file" / "x", CONTENT)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as mine, (tmp_path / ".lock").open("w") as other:
        assert try_lock(mine) is Lock.LOCKED
        assert try_lock(other) is Lock.BUSY


def test_without_file_locks_a_warning_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    with (tmp_path / ".lock").open("w") as file, pytest.warns(UserWarning, match="no file locks"):
        assert try_lock(file) is Lock.UNAVAILABLE


def _flock_fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def failing(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", failing)


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL"])
def test_a_file_system_without_locks_is_not_a_locked_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _flock_fails(monkeypatch, getattr(errno, name))
    with (tmp_path / ".lock").open("w") as file, pytest.warns(UserWarning, match=r"has no file locks .*local disk"):
        assert try_lock(file) is Lock.UNAVAILABLE


def test_another_error_of_a_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _flock_fails(monkeypatch, errno.EIO)
    with (tmp_path / ".lock").open("w") as file, pytest.raises(CheckpointError, match=r"cannot lock .*Input/output"):
        try_lock(file)
