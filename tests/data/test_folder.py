"""Folders of images: the documented layouts are read, all others are refused with a reason."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from petune.base.errors import DataError
from petune.data import load_dataset
from petune.data.copies import rows_of_copies
from petune.data.folder import load_folder


def _fill(root: Path, counts: dict[str, int], start: int = 0) -> None:
    """Write classes with images whose gray value encodes the class (tens) and the image (ones)."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("L", (40, 40), 50 * label + start + i).save(root / name / f"{i:02}.png")


def test_existing_splits_are_kept(tmp_path: Path) -> None:
    for i, (part, count) in enumerate((("train", 4), ("val", 2), ("test", 3))):
        _fill(tmp_path / part, {"cat": count, "dog": count}, start=10 * i)
    data = load_folder(tmp_path, 32)
    assert (len(data.train), len(data.val), len(data.test)) == (8, 4, 6)
    assert data.classes == ("cat", "dog")
    assert (data.source, data.augment) == (str(tmp_path), "crop")
    for split, start in ((data.train, 0), (data.val, 10), (data.test, 20)):
        values = split.images[split.rows][:, 0, 0, 0].astype(int)
        assert np.array_equal(values // 50, split.targets)
        assert np.array_equal(values % 50 // 10, np.full(len(split), start // 10))


@pytest.mark.parametrize("part", ["train", "."])
def test_without_a_test_folder_a_fifth_is_cut_from_train(part: str, tmp_path: Path) -> None:
    _fill(tmp_path / part, {"cat": 10, "dog": 20})
    data = load_folder(tmp_path, 32)
    assert np.bincount(data.train.targets).tolist() == [8, 16]
    assert np.bincount(data.test.targets).tolist() == [2, 4]
    assert not set(data.train.rows) & set(data.test.rows)
    assert "20% of train is used for testing" in data.source
    assert data.test.rows.tolist() == load_folder(tmp_path, 32).test.rows.tolist()


def test_images_are_named_by_their_files(tmp_path: Path) -> None:
    _fill(tmp_path, {"cat": 10, "dog": 20})
    data = load_folder(tmp_path, 32)
    for split in (data.train, data.test):
        assert split.names is not None
        for name, target, row in zip(split.names, split.targets, split.rows, strict=True):
            assert Path(name).parent.name == data.classes[target]
            assert int(Path(name).stem) == split.images[row][0, 0, 0] % 50


def test_subfolders_are_searched_and_hidden_or_other_files_ignored(tmp_path: Path) -> None:
    _fill(tmp_path, {"cat": 5, "dog": 5})
    for name in ("notes.txt", ".hidden.png", "Thumbs.db"):
        (tmp_path / "cat" / name).write_bytes(b"not an image")
    _fill(tmp_path / ".cache", {"cat": 1})
    _fill(tmp_path / "cat", {".trash": 1, "deeper": 3})
    (tmp_path / "README.md").touch()
    Image.new("RGB", (9, 9)).save(tmp_path / "dog" / "UPPER.JPG", "JPEG")
    data = load_folder(tmp_path, 32)
    assert data.classes == ("cat", "dog")
    assert np.bincount(np.concatenate([data.train.targets, data.test.targets])).tolist() == [8, 6]


def test_images_are_cached_with_a_margin(tmp_path: Path) -> None:
    _fill(tmp_path, {"cat": 5, "dog": 5})
    for size, side in ((32, 37), (224, 256)):
        data = load_dataset(f"folder:{tmp_path}", image_size=size)
        assert data.train.images.shape == (10, side, side, 3)
        assert data.train.crop == 0.875
        assert isinstance(data.train.images, np.memmap)


def test_decoding_is_cached_until_a_file_changes(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "images"
    _fill(root, {"cat": 5, "dog": 5})
    load_folder(root, 32)
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("images.npy")}
    load_folder(root, 32)
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("images.npy")} == before
    Image.new("L", (40, 40), 255).save(root / "cat" / "00.png")
    data = load_folder(root, 32)
    assert 255 in data.train.images[:, 0, 0, 0]


def test_two_folders_with_the_same_listing_have_separate_caches(tmp_path: Path) -> None:
    for name, value in (("a", 10), ("b", 20)):
        for number, label in enumerate(("cat", "dog")):
            for i in range(2):
                file = tmp_path / name / label / f"{i}.bmp"  # BMP files of one shape have one size
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (40, 40), value + 2 * number + i).save(file)
                os.utime(file, (0, 0))
    first, second = (load_folder(tmp_path / name, 32) for name in "ab")
    assert first.train.images[0, 0, 0, 0] == 10
    assert second.train.images[0, 0, 0, 0] == 20


def test_a_broken_image_is_an_error_with_its_path(tmp_path: Path, cache: Path) -> None:
    _fill(tmp_path / "p", {"cat": 5, "dog": 5})
    (tmp_path / "p" / "dog" / "03.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError, match=r"dog/03\.png: not a readable image"):
        load_folder(tmp_path / "p", 32)
    assert not list(cache.rglob("*.npy"))


def test_an_unwritable_cache_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path / "p", {"cat": 5, "dog": 5})
    (tmp_path / "file").touch()
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="PETUNE_CACHE"):
        load_folder(tmp_path / "p", 32)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ({}, None, "no images in"),
        ({"cat": 0, "dog": 0}, None, "no images in"),
        ({"cat": 3}, None, "only one class folder in .*: cat"),
        ({"cat": 3, "dog": 0}, None, r"class folder dog \(train"),
        ({"cat": 3, "dog": 3}, {"cat": 3}, "test has no dog"),
        ({"cat": 3, "dog": 3}, {"cat": 3, "dog": 3, "emu": 3}, "train has no emu"),
        ({"cat": 3, "dog": 3}, {"cat": 3, "dogs": 3}, "test has no dog and train has no dogs"),
        ({"cat": 3, "dog": 3}, {"cat": 3, "dog": 0}, r"class folder dog \(test"),
        ({"cat": 1, "dog": 1}, None, "no test images"),
    ],
)
def test_inconsistent_folders_are_refused(
    train: dict[str, int], test: dict[str, int] | None, message: str, tmp_path: Path
) -> None:
    _fill(tmp_path if test is None else tmp_path / "train", train)
    if test is not None:
        _fill(tmp_path / "test", test)
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path, 32)


def test_a_test_folder_without_train_is_refused(tmp_path: Path) -> None:
    _fill(tmp_path / "test", {"cat": 3, "dog": 3})
    with pytest.raises(DataError, match="has test/ but no class folders in train/"):
        load_folder(tmp_path, 32)


def test_a_file_or_a_missing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        load_folder(tmp_path / "file", 32)
    with pytest.raises(DataError, match="no such folder"):
        load_folder(tmp_path / "nowhere", 32)


def _with_broken(root: Path, broken: int, good: int = 100) -> None:
    _fill(root, {"cat": good, "dog": good})
    for i in range(broken):
        file = root / "cat" / f"{i:02}.png"
        file.write_bytes(file.read_bytes()[:-30])


def test_broken_images_can_be_skipped_and_are_named(tmp_path: Path) -> None:
    _with_broken(tmp_path, 2)
    with pytest.raises(DataError, match=r"00\.png: not a readable image.*on_broken='skip'"):
        load_folder(tmp_path, 32)
    for _ in range(2):  # decoded, and from the cache
        data = load_dataset(f"folder:{tmp_path}", image_size=32, on_broken="skip")
        assert len(data.train) + len(data.test) == 198
        assert "2 broken images skipped: cat/00.png, cat/01.png" in data.source
        assert {int(x) for x in data.train.images[data.train.rows][:, 0, 0, 0]}.isdisjoint({0, 1})
    with pytest.raises(DataError, match=r"00\.png: not a readable image"):
        load_folder(tmp_path, 32)


def test_too_many_broken_images_are_an_error(tmp_path: Path) -> None:
    _with_broken(tmp_path, 3)
    with pytest.raises(DataError, match=r"broken images: 3 of 200.*1%.*00\.png"):
        load_folder(tmp_path, 32, "skip")
    with pytest.raises(DataError, match=r"broken images: 3 of 200") as found:
        load_folder(tmp_path, 32)
    assert "on_broken" not in str(found.value)  # it would be refused next
    assert len(found.value.broken) == 3
    rest = load_folder(tmp_path, 32, "skip", max_broken=1.0)
    assert len(rest.train) + len(rest.test) == 197
    with pytest.raises(DataError, match=r"broken images: 3 of 200"):  # also with these pixels in the cache
        load_folder(tmp_path, 32, "skip")


def test_a_copy_in_another_class_is_told(tmp_path: Path) -> None:
    _fill(tmp_path, {"cat": 10, "dog": 10})
    shutil.copy(tmp_path / "cat" / "03.png", tmp_path / "cat" / "same.png")
    assert "another class" not in load_folder(tmp_path, 32).source
    shutil.copy(tmp_path / "cat" / "03.png", tmp_path / "dog" / "wrong.png")
    assert (
        "1 copy of an image is in another class, such as dog/wrong.png and cat/03.png"
        in load_folder(tmp_path, 32).source
    )


def test_a_val_folder_that_is_used_for_testing_is_called_test(tmp_path: Path) -> None:
    _fill(tmp_path / "train", {"cat": 10, "dog": 10})
    _fill(tmp_path / "val", {"cat": 4, "dog": 4}, start=40)
    shutil.copy(tmp_path / "train" / "cat" / "03.png", tmp_path / "val" / "cat" / "same.png")
    source = load_folder(tmp_path, 32).source
    assert "another val is cut from train" in source
    assert "1 image of test is a copy of an image of train" in source


def test_classes_with_few_test_images_are_named(tmp_path: Path) -> None:
    _fill(tmp_path / "train", {"cat": 10, "dog": 10})
    _fill(tmp_path / "test", {"cat": 12, "dog": 9}, start=40)
    note = load_folder(tmp_path, 32).few_test_images_note()
    assert note.endswith(": dog (9)")
    (next((tmp_path / "test" / "cat").iterdir())).rename(tmp_path / "test" / "dog" / "tenth.png")
    assert load_folder(tmp_path, 32).few_test_images_note() == ""


def test_check_finds_broken_images_and_images_in_two_splits(tmp_path: Path) -> None:
    from petune.data.check import check_dataset

    _fill(tmp_path / "train", {"cat": 3, "dog": 2})
    _fill(tmp_path / "test", {"cat": 2, "dog": 2}, start=20)
    assert check_dataset(f"folder:{tmp_path}").is_sound
    shutil.copy(tmp_path / "train" / "cat" / "01.png", tmp_path / "test" / "dog" / "x.png")
    (tmp_path / "train" / "dog" / "00.png").write_bytes(b"no image")
    report = check_dataset(f"folder:{tmp_path}")
    assert report.images == {"train": {"cat": 3, "dog": 2}, "test": {"cat": 2, "dog": 3}}
    assert [message.split(": ")[0] for message in report.broken] == [str(tmp_path / "train" / "dog" / "00.png")]
    pair = (str(tmp_path / "test" / "dog" / "x.png"), str(tmp_path / "train" / "cat" / "01.png"))
    assert report.in_two_splits == [pair]


def test_links_to_a_parent_are_not_followed(tmp_path: Path) -> None:
    from petune.data.find_images import find_images

    root, other = tmp_path / "pets", tmp_path / "elsewhere"
    _fill(root, {"cat": 5, "dog": 5})
    _fill(other, {"more": 3})
    (root / "cat" / "back").symlink_to(root / "cat")
    (root / "dog" / "up").symlink_to(root)
    (root / "cat" / "more").symlink_to(other / "more")
    assert [len(find_images(root / name)) for name in ("cat", "dog")] == [8, 5]
    data = load_folder(root, 32)
    assert len(data.train) + len(data.test) == 13


def test_a_dangling_link_is_a_broken_image(tmp_path: Path) -> None:
    from petune.data.check import check_dataset

    _fill(tmp_path, {"cat": 60, "dog": 60})
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        load_folder(tmp_path, 32)
    assert "1 broken image skipped: cat/gone.png" in load_folder(tmp_path, 32, "skip").source
    report = check_dataset(f"folder:{tmp_path}")
    assert len(report.broken) == 1
    assert not report.in_two_splits


def test_copies_are_always_cut_into_the_same_split(tmp_path: Path) -> None:
    _fill(tmp_path, {"cat": 30, "dog": 30})
    for image in [*tmp_path.glob("*/*.png")]:
        shutil.copy(image, image.with_suffix(".copy.png"))
    for again in range(2):  # decoded, and from the cache
        data = load_folder(tmp_path, 32).with_val(0.2, seed=again)
        assert "; 60 copies of other images" in data.source
        rows = [set(split.rows) for split in (data.train, data.val, data.test)]
        assert not rows[0] & rows[1] | rows[0] & rows[2] | rows[1] & rows[2]
        assert [len(split) for split in (data.train, data.val, data.test)] == [76, 20, 24]
        for split in (data.train, data.val, data.test):
            assert np.array_equal(split.images[split.rows][:, 0, 0, 0] // 50, split.targets)


def test_files_of_the_same_size_are_copies_only_if_all_bytes_are(tmp_path: Path) -> None:
    contents = [b"a" * 9999, b"b" + b"a" * 9998, b"a" * 9999, b"c" * 9999, b"a", b"a", b"b"]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    missing = [tmp_path / "missing", tmp_path / "missing too"]
    assert rows_of_copies([*paths, *missing]).tolist() == [0, 1, 0, 3, 4, 4, 6, 7, 8]


def test_class_folders_need_utf8_names(tmp_path: Path) -> None:
    _fill(tmp_path, {"cat": 3, "d\udcfcg": 3})
    with pytest.raises(DataError, match=r"'d\\udcfcg' in .* is not UTF-8"):
        load_folder(tmp_path, 32)


def test_unsupported_images_are_counted_and_reported(tmp_path: Path) -> None:
    from petune.data.check import check_dataset

    _fill(tmp_path, {"cat": 3, "dog": 3})
    assert load_folder(tmp_path, 32).source.endswith("testing)")
    for name in ("a.HEIC", "b.heic", "notes.txt", ".hidden.heic"):
        (tmp_path / "dog" / name).write_bytes(b"x")
    report = check_dataset(f"folder:{tmp_path}")
    assert (report.skipped, report.is_sound) == ({".heic": 2, ".txt": 1}, True)
    assert "; 2 .heic skipped" in load_folder(tmp_path, 32).source


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_if_pillow_can(tmp_path: Path) -> None:
    _fill(tmp_path, {"cat": 3, "dog": 3})
    Image.new("RGB", (40, 40)).save(tmp_path / "cat" / "x.avif")
    data = load_folder(tmp_path, 32)
    assert len(data.train) + len(data.test) == 7


def test_a_cache_that_another_process_finishes_meanwhile_is_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(tmp_path / "p", {"cat": 5, "dog": 5})
    numpy_load, first = np.load, list[Path]()

    def load_too_early(file: Path, **options: object) -> object:
        if not first:
            first.append(file.parent)
            load_folder(tmp_path / "p", 32)  # the other process, just before this one finds nothing
            (file.parent / "theirs").touch()
            raise FileNotFoundError(file)
        return numpy_load(file, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(np, "load", load_too_early)
    load_folder(tmp_path / "p", 32)
    assert (first[0] / "theirs").exists()


def test_copies_in_test_are_told(tmp_path: Path) -> None:
    _fill(tmp_path / "train", {"cat": 4, "dog": 4})
    _fill(tmp_path / "test", {"cat": 4, "dog": 4}, start=20)
    assert "warning" not in load_folder(tmp_path, 32).source
    original = next((tmp_path / "train" / "cat").iterdir())
    for name in ("x", "y"):
        (tmp_path / "test" / "cat" / f"{name}{original.suffix}").write_bytes(original.read_bytes())
    assert (
        "warning: 2 images of test are copies of images of train, such as test/cat/x"
        in load_folder(tmp_path, 32).source
    )


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="HEIC is read here")
def test_a_folder_of_heic_images_names_their_decoder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.HEIC").write_bytes(b"photo")
    with pytest.raises(DataError, match=r"2 \.heic.*pip install pillow-heif"):
        load_dataset(f"folder:{tmp_path}")


def test_a_link_to_itself_is_reported_and_hides_no_other_image(tmp_path: Path) -> None:
    _fill(tmp_path, {"cat": 20, "dog": 20})
    (tmp_path / "cat" / "latest.png").symlink_to("latest.png")
    with pytest.raises(DataError, match=r"latest\.png: not a readable image"):
        load_folder(tmp_path, 32)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path, {"cat": 20, "dog": 20})
    _fill(tmp_path / "cat", {"more": 5})
    scandir = os.scandir

    def without_permission(path: Path) -> object:
        if Path(path).name == "more":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("petune.data.find_images.os.scandir", without_permission)
    with pytest.raises(DataError, match=r"cannot list .*more: Permission denied"):
        load_folder(tmp_path, 32)
