"""A disk that is really full, or read-only: a small tmpfs, filled before each kind of write."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petune.base.errors import PetuneError
from petune.data.dataset import Dataset
from petune.data.folder import load_folder
from petune.runner.compare import compare
from petune.runner.compare_config import CompareConfig
from petune.runner.run import run
from petune.serving.export import export
from tests.faults.conftest import digests, tally, tries
from tests.faults.test_together import tiny_config

PAGE = 4096
SIZE = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--recursive", place], check=True)


def leave(disk: Path, free: int) -> None:
    """Fill the disk but for `free` bytes."""
    room = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        if (size := room.f_bavail * room.f_frsize - free) > 0:
            os.posix_fallocate(file.fileno(), 0, size)


def refused(call: Callable[[], object]) -> str:
    """The message of the one error that `call` ends with; empty where it does not."""
    try:
        call()
    except PetuneError as error:
        return str(error) if error.exit_code in (2, 4) else ""
    return ""


@pytest.mark.exhaustive
def test_a_run_on_a_disk_that_fills_up(disk: Path, tmp_path: Path) -> None:
    run(tiny_config(tmp_path / "whole"))
    expected, held, free, tried = digests(tmp_path / "whole"), 0, 0, 0
    hit: set[str] = set()
    while True:
        leave(disk, free)
        message = refused(lambda: run(tiny_config(disk / "run")))
        (disk / "ballast").unlink()
        if not message:
            break
        assert "No space left on device" in message
        hit |= {part for part in ("config.yaml", "metrics", "step-", "adapter", "result") if f"/{part}" in message}
        run(tiny_config(disk / "run", resume=True))
        stumps = [p for p in (disk / "run").rglob(".*") if p.name != ".lock"]
        held += digests(disk / "run") == expected and not stumps
        subprocess.run(["rm", "-r", disk / "run"], check=True)
        tried, free = tried + 1, free + (tries(3, 1) if tried > 1 else 1) * PAGE
    assert {"config.yaml", "metrics", "step-", "adapter", "result"} >= hit >= {"config.yaml", "metrics", "step-"}, hit
    tally("a full disk (tmpfs), at any point of a run", "one error; resumes bit-identically", tried, held)


@pytest.mark.exhaustive
def test_a_table_and_an_export_on_a_full_disk(disk: Path) -> None:
    shared = tiny_config(disk / "x").model_copy(update={"output": None})
    config = CompareConfig(methods=("linear",), run=shared, output=disk / "c")
    compare(config)
    names = ("compare.json", "compare.md", "compare.svg")
    whole = {name: (disk / "c" / name).read_bytes() for name in names}
    source = next((disk / "c").glob("linear*"))
    held = tried = 0
    for name in names:
        (disk / "c" / name).unlink()
        leave(disk, 0)
        message = refused(lambda: compare(config))
        (disk / "ballast").unlink()
        compare(config)
        held += "No space left" in message and {n: (disk / "c" / n).read_bytes() for n in names} == whole
        tried += 1
    out = disk / "new" / "plain.safetensors"
    leave(disk, 0)
    message = refused(lambda: export(source, out))
    held += str(out) in message and "No space left" in message and not list(out.parent.iterdir())
    (disk / "ballast").unlink()
    assert export(source, out).bytes == out.stat().st_size
    tally("a full disk (tmpfs), at a table or an export", "one error; a retry gives the same result", tried + 1, held)


def test_a_place_that_becomes_read_only(disk: Path, tmp_path: Path) -> None:
    run(tiny_config(tmp_path / "whole"))
    seen: list[object] = []

    def read_only(event: object) -> None:
        if type(event).__name__ == "StepDone" and not seen:
            seen.append(event)
            subprocess.run(["mount", "--bind", disk / "run", disk / "run"], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", disk / "run"], check=True)

    message = refused(lambda: run(tiny_config(disk / "run"), watch=read_only))
    subprocess.run(["umount", disk / "run"], check=True)
    assert "Read-only file system" in message
    run(tiny_config(disk / "run", resume=True))
    held = int(digests(disk / "run") == digests(tmp_path / "whole"))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    held += "Read-only file system" in refused(lambda: run(tiny_config(disk / "other")))
    tally("a directory that is or becomes read-only (tmpfs)", "one error; resumes bit-identically", 2, held)


def test_a_cache_on_a_disk_that_fills_up(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(16):
        place = tmp_path / "pets" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (10 * number, 0, 0)).save(place / f"{number}.png")
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    expected = load_folder(tmp_path / "pets", 32).train.images[:]
    monkeypatch.setenv("PETUNE_CACHE", str(disk / "cache"))
    tried, held, on_request = 0, 0, 0
    while True:
        leave(disk, tried * PAGE)
        loaded: list[Dataset] = []
        message = refused(lambda loaded=loaded: loaded.append(load_folder(tmp_path / "pets", 32)))
        (disk / "ballast").unlink()
        if message:
            left = [p.name for p in disk.glob("cache/decoded/*")]
            held += "PETUNE_CACHE" in message and str(disk) in message and left in ([], [".lock"])
        elif isinstance(loaded[0].train.images, np.memmap):
            break
        else:
            held += np.array_equal(loaded[0].train.images[:], expected)
            on_request += 1
        shutil.rmtree(disk / "cache", ignore_errors=True)
        tried += 1
    assert 0 < on_request < tried
    assert tried > 10
    assert np.array_equal(load_folder(tmp_path / "pets", 32).train.images[:], expected)
    tally("the cache on a full disk (tmpfs), at any point", "decoded on request, or one error", tried, held)
