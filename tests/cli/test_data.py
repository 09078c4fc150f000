"""`petune data check`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

Run = Callable[..., Any]


def _fill(folder: Path) -> None:
    for number, name in enumerate(("cat", "dog", "d\x1b[31mg")):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (9, 9), 40 * number + i).save(folder / name / f"{i}.png")


def test_a_sound_folder(petune: Run, tmp_path: Path) -> None:
    _fill(tmp_path / "pets")
    done = petune("data", "check", "pets")
    assert done.code == 0, done.err
    assert "| cat" in done.out
    assert done.out.endswith("no problems found\n")
    assert "\x1b" not in done.out


def test_a_broken_image_exits_with_4(petune: Run, tmp_path: Path) -> None:
    _fill(tmp_path / "pets")
    (tmp_path / "pets" / "dog" / "0.png").write_bytes(b"GIF89a")
    done = petune("data", "check", "pets")
    assert done.code == 4
    assert "pets/dog/0.png: not a readable image" in done.out
    assert done.out.endswith("1 broken, 0 in two splits, 0 in two classes\n")
    report = json.loads(petune("data", "check", "pets", "--json").out)
    assert report["images"]["train"]["cat"] == 2
    assert len(report["broken"]) == 1


def test_copies_are_counted_and_copies_in_another_class_are_a_problem(petune: Run, tmp_path: Path) -> None:
    _fill(tmp_path / "pets")
    shutil.copy(tmp_path / "pets" / "cat" / "0.png", tmp_path / "pets" / "cat" / "0 (1).png")
    done = petune("data", "check", "pets")
    assert done.code == 0, done.err
    assert done.out.endswith(
        "1 copy within a class; cutting a split keeps copies together\n"
        "too few different images for a val split: cat, d[31mg, dog\nno problems found\n"
    )
    shutil.copy(tmp_path / "pets" / "dog" / "0.png", tmp_path / "pets" / "cat" / "x.png")
    done = petune("data", "check", "pets")
    assert done.code == 4
    assert "pets/dog/0.png is the same image as pets/cat/x.png, in another class\n" in done.out
    assert done.out.endswith("0 broken, 0 in two splits, 1 in two classes\n")
    report = json.loads(petune("data", "check", "pets", "--json").out)
    assert (report["copies"], report["in_two_classes"]) == (1, [["pets/dog/0.png", "pets/cat/x.png"]])


def test_classes_too_small_for_every_split_are_named(petune: Run, tmp_path: Path) -> None:
    _fill(tmp_path / "pets")
    shutil.copy(tmp_path / "pets" / "cat" / "0.png", tmp_path / "pets" / "cat" / "1.png")
    Image.new("L", (9, 9), 99).save(tmp_path / "pets" / "dog" / "2.png")
    done = petune("data", "check", "pets")
    assert done.code == 0, done.err
    assert "too few different images for a test split: cat\n" in done.out
    assert "too few different images for a val split: cat, d[31mg\n" in done.out
    (tmp_path / "split").mkdir()
    shutil.copytree(tmp_path / "pets", tmp_path / "split" / "train")
    shutil.copytree(tmp_path / "pets", tmp_path / "split" / "test")
    report = json.loads(petune("data", "check", "split", "--json").out)
    assert (report["too_few_for_test"], report["too_few_for_val"]) == ([], ["cat"])


def test_a_missing_folder(petune: Run) -> None:
    done = petune("data", "check", "folder:nowhere")
    assert done.code == 4
    assert "no such folder: nowhere" in done.err
    assert petune("data", "check", "nowhere").code == 2


def test_unsupported_images_are_reported(petune: Run, tmp_path: Path) -> None:
    _fill(tmp_path / "pets")
    (tmp_path / "pets" / "dog" / "photo.HEIC").write_bytes(b"x")
    done = petune("data", "check", "pets")
    assert done.code == 0, done.err
    assert "1 .heic skipped" in done.out
    assert json.loads(petune("data", "check", "pets", "--json").out)["skipped"] == {".heic": 1}


def test_imbalance_sizes_and_histogram(petune: Run, tmp_path: Path) -> None:
    for name, count in (("cat", 12), ("dog", 3)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(count):
            side = 300 if i else 20
            Image.new("L", (side, 40 + side), 10 * count + i).save(tmp_path / "pets" / name / f"{i}.png")
    done = petune("data", "check", "pets", "--image-size", "100")
    assert done.code == 0, done.err
    assert "imbalance in train: 4 to 1; largest cat (12), smallest dog (3)\n" in done.out
    assert "sizes in pixels: 20x60 to 300x340, median 300x340; 2 of 15 smaller than the input of 100\n" in done.out
    bars = [line.split("|")[3].strip() for line in done.out.splitlines() if line.startswith(("| cat", "| dog"))]
    assert [len(bar) for bar in bars] == [16, 4]
    report = json.loads(petune("data", "check", "pets", "--json").out)
    assert report["balance"] == {"ratio": 4.0, "smallest": ["dog", 3], "largest": ["cat", 12]}
    assert (report["sizes"]["largest"], report["sizes"]["num_smaller"]) == ([300, 340], 2)


def test_near_duplicates_between_splits_are_a_leak(petune: Run, tmp_path: Path) -> None:
    for number, photo in enumerate(load_sample_images().images):
        for i in range(6):
            crop = Image.fromarray(photo).crop((90 * i, 40 * i, 90 * i + 180, 40 * i + 180))
            for part, image in (("train", crop), ("test", ImageOps.mirror(crop).resize((120, 120)))):
                if part == "train" or i == 3:
                    (tmp_path / "photos" / part / f"photo{number}").mkdir(parents=True, exist_ok=True)
                    image.save(tmp_path / "photos" / part / f"photo{number}" / f"{i}.jpg", quality=80)
    done = petune("data", "check", "photos")
    assert done.code == 0, done.err
    assert "leak: 2 images of test (100.0%) with a near-duplicate in train; 2 pairs\n" in done.out
    assert "photos/test/photo0/3.jpg ~ photos/train/photo0/3.jpg" in done.out
    assert "mirrored" in done.out
    (leak,) = json.loads(petune("data", "check", "photos", "--json").out)["near_duplicates"]
    assert (leak["split"], leak["other"], leak["num_pairs"], len(leak["pairs"])) == ("test", "train", 2, 2)


def test_any_dataset_can_be_checked(petune: Run) -> None:
    done = petune("data", "check", "digits", "--json")
    report = json.loads(done.out)
    assert done.code == 0, done.err
    assert (report["source"], sum(report["num_images"].values())) == ("scikit-learn", 1797)
    assert report["sizes"]["smallest"] == [8, 8]
    unknown = petune("data", "check", "digist")
    assert (unknown.code, "digits" in unknown.err) == (2, True)


def test_images_are_shown_as_the_model_sees_them(petune: Run, tmp_path: Path) -> None:
    words = ("data", "show", "digits", "--images", "5", "--times", "2", "--image-size", "48", "-o", "page.html")
    done = petune(*words)
    assert done.code == 0, done.err
    page = (tmp_path / "page.html").read_text()
    assert page.count('<figure class="tile">') == 5
    assert page.count("data:image/png;base64,") == 15
    assert "Augmentation: shift" in page
    assert "<script" not in page
    assert (
        petune("data", "show", "digits", "--images", "5", "--times", "2", "--image-size", "48", "-o", "page.html").code
        == 0
    )
    assert (tmp_path / "page.html").read_text() == page
    plain = petune("data", "show", "digits", "--augment", "none", "--split", "test", "--json")
    assert json.loads(plain.out) == {"output": "images.html", "images": 24, "augment": "none"}


def test_invalid_requests_to_show_images(petune: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("my own")
    other = petune("data", "show", "digits", "--output", "mine.html")
    assert (other.code, (tmp_path / "mine.html").read_text()) == (2, "my own")
    near = petune("data", "show", "digits", "--augment", "ligth")
    assert (near.code, "light" in near.err) == (2, True)
    steps = petune("data", "show", "digits", "--images=2", "--augment", "[horizontal_flip, color_jitter: {hue: 0.2}]")
    assert steps.code == 0, steps.err
    assert "Augmentation: horizontal_flip, color_jitter." in (tmp_path / "images.html").read_text()
    empty = petune("data", "show", "digits", "--split", "val")
    assert (empty.code, "no val split" in empty.err) == (2, True)


def test_all_broken_images_of_a_table_are_listed(petune: Run, tmp_path: Path) -> None:
    rows = ["file,label"]
    for i in range(20):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'ab'[i % 2]}")
    for i in range(7):
        (tmp_path / f"{i}.png").write_text("none")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    done = petune("data", "check", "t.csv", "--image-size", "16")
    assert done.code == 4
    assert done.out.count("not a readable image") == 7
    assert "7 broken" in done.out
    assert "sizes in pixels: 8x8" in done.out


def test_different_channels_are_a_problem(petune: Run, tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / "mixed" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 4 if i else 12), np.uint8)
        np.save(tmp_path / "mixed" / "ab"[i % 2] / f"{i}.npy", pixels)
    done = petune("data", "check", "mixed")
    assert done.code == 4
    assert "12 channels of uint8" in done.out
    assert "unusable channels" in done.out


def test_broken_images_are_left_out_of_the_page(petune: Run, tmp_path: Path) -> None:
    for number in range(12):
        file = tmp_path / "pets" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(file)
    (tmp_path / "pets" / "cat" / "broken.png").write_bytes(b"no image")
    shown = petune("data", "show", "pets", "--image-size", "8", "--images", "20")
    assert shown.code == 0, shown.err
    assert "1 broken image skipped: cat/broken.png" in shown.err
    assert (tmp_path / "images.html").exists()
