"""What could not be read once is tried again: only its mode may have changed, and neither size nor time of the file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from petune.data import Dataset, load_dataset
from petune.data.copies import copies_note
from petune.data.load import read_dataset
from petune.data.reader import ReadContext
from tests.data.tables import digit, write_images, write_table

COUNT = 12


def unreadable(path: Path) -> Callable[[], None]:
    """Let a file not be decoded, without another size or time, and return how to undo it: tests may run as root."""
    content, stat = path.read_bytes(), path.stat()

    def write(data: bytes) -> None:
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    write(bytes(len(content)))
    return lambda: write(content)


def skipping(name: str, **context: Any) -> Dataset:
    return read_dataset(name, ReadContext(14, on_broken="skip", max_broken=1.0, **context))


def num_samples(data: Dataset) -> int:
    return len(data.train) + len(data.val) + len(data.test)


@pytest.mark.parametrize("cache_gb", [1, 0])
def test_images_of_folders_and_tables(cache_gb: float, tmp_path: Path) -> None:
    files = [f"{name}/{file}" for name in "ab" for file in write_images(tmp_path / "images" / name, COUNT)]
    for i, file in enumerate(files):
        Image.fromarray(digit(i)).save(tmp_path / "images" / file)
    table = write_table(tmp_path / "t.csv", [{"image": f"images/{file}", "label": file[0]} for file in files])
    names = (f"folder:{tmp_path / 'images'}", f"table:{table}")
    restore = unreadable(tmp_path / "images" / files[3])
    for _ in range(2):
        assert [num_samples(skipping(name, cache_gb=cache_gb)) for name in names] == [2 * COUNT - 1] * 2
    restore()
    for name in names:
        data = skipping(name, cache_gb=cache_gb)
        assert num_samples(data) == 2 * COUNT
        assert "skipped" not in data.source
        assert data.train.images[3].any()


def test_masks(tmp_path: Path) -> None:
    rows = [{"image": name, "mask": f"m{name}"} for name in write_images(tmp_path, COUNT)]
    for i in range(COUNT):
        Image.fromarray(digit(i) // 86).save(tmp_path / f"m{i}.png")
    name = f"table:{write_table(tmp_path / 't.csv', rows)},classes=[a,b,c]"
    restore = unreadable(tmp_path / "m3.png")
    assert num_samples(skipping(name)) == COUNT - 1
    restore()
    data = skipping(name)
    assert num_samples(data) == COUNT
    assert data.train.targets[3].any()


def test_copies_of_a_file_that_could_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {part: [tmp_path / part / write_images(tmp_path / part, 1)[0]] for part in ("train", "test")}
    real = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path == files["test"][0]:
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        assert copies_note(files, tmp_path) == ""
    assert "1 image of test is a copy" in copies_note(files, tmp_path)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Write a table and two class folders of videos with 6 frames each."""
    pytest.importorskip("av")
    from moving_digits import encode

    rows = []
    for i in range(COUNT):
        name = f"videos/{'ab'[i % 2]}/{i}.mp4"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        encode(tmp_path / name, np.full((6, 16, 16, 3), 10 * i + 60, np.uint8))
        rows.append({"video": name, "label": "ab"[i % 2]})
    write_table(tmp_path / "t.csv", rows)
    return tmp_path


def test_videos_of_folders_and_tables(videos: Path) -> None:
    names = [f"video:{videos / 'videos'},frames=4", f"table:{videos / 't.csv'},frames=4"]
    restore = unreadable(videos / "videos/b/3.mp4")
    for _ in range(2):
        assert [num_samples(skipping(name)) for name in names] == [COUNT - 1] * 2
    restore()
    for name in names:
        data = load_dataset(name, image_size=14)
        assert num_samples(data) == COUNT
        assert data.train.images[:].min() > 40  # none is black


def test_stored_frames_are_used_when_the_disk_is_fuller(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"video:{videos / 'videos'},frames=4"
    first = load_dataset(name, image_size=14).train.images
    real = shutil.disk_usage(videos)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=1000))
    again: Any = load_dataset(name, image_size=14).train.images
    assert isinstance(again.frames, np.ndarray)
    assert np.array_equal(again[:], first[:])
    other: Any = load_dataset(name, image_size=28).train.images
    assert other.frames is None
