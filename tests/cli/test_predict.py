"""`petune predict`: predictions equal those of the test split; unreadable images; names with control characters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import petune as public
from petune.base.files import write_directory
from petune.data import load_dataset
from petune.data.batches import eval_batches
from petune.serving.image_transform import ImageTransform
from petune.serving.predict import Predictor

Run = Callable[..., Any]


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """The first images of the test split as files, some of them deeper."""
    test = load_dataset("digits").test
    (tmp_path / "images" / "deeper").mkdir(parents=True)
    files = [tmp_path / "images" / ("deeper" if i > 2 else "") / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        Image.fromarray(test.images[test.rows[i]]).save(file)
    return files


def test_predictions_of_files_equal_those_of_the_test_split(digits: Path, images: list[Path]) -> None:
    predictor = Predictor(digits, device="cpu")
    test = load_dataset("digits").test
    batch = next(eval_batches(test, predictor.transform.preprocess, 5, torch.device("cpu")))
    expected = predictor.logits(batch.x_BCHW).softmax(-1)
    for prediction, row in zip(predictor(images, top_k=10, batch_size=2), expected, strict=True):
        assert prediction.error == ""
        assert [guess.probability for guess in prediction.top] == sorted(
            (g.probability for g in prediction.top), reverse=True
        )
        by_class = [dict(prediction.top)[str(digit)] for digit in range(10)]
        torch.testing.assert_close(torch.tensor(by_class), row, atol=1e-6, rtol=1e-5)


def test_json_lines_with_a_broken_image(petune: Run, digits: Path, images: list[Path]) -> None:
    bad = images[0].with_name("2x.png")
    bad.write_bytes(images[0].read_bytes()[:60])
    done = petune("predict", digits, "images", "nowhere.png", "--top-k", 2, "--batch-size", 3, "--json")
    assert done.code == 4
    lines = [json.loads(line) for line in done.out.splitlines()]
    names = ["0.png", "1.png", "2.png", "2x.png", "deeper/3.png", "deeper/4.png"]
    assert [line["image"] for line in lines] == [*(f"images/{name}" for name in names), "nowhere.png"]
    assert ["error" in line for line in lines] == [False, False, False, True, False, False, True]
    assert all(len(line["top"]) == 2 for line in lines if "top" in line)
    assert "2x.png: not a readable image" in done.err
    assert "nowhere.png" in done.err
    alone = petune("predict", digits, images[4], "--top-k", 2, "--json")
    assert alone.code == 0
    assert "1 image classified" in petune("predict", digits, images[4]).err
    for one, other in zip(json.loads(alone.out)["top"], lines[5]["top"], strict=True):
        assert one == {"class": other["class"], "probability": pytest.approx(other["probability"], abs=1e-5)}


def test_unreadable_images_are_named(petune: Run, digits: Path, images: list[Path]) -> None:
    """An unsupported format in a folder, and a name that looks like another user's home."""
    images[0].with_name("IMG_1.HEIC").write_bytes(b"ftypheic")
    images[0].with_name("IMG_2.MOV").write_bytes(b"")
    done = petune("predict", digits, "images", "~nobody.png", "--top-k", 1)
    assert done.code == 4
    assert "images/IMG_1.HEIC: not a readable image" in done.err
    assert "unsupported format; convert it" in done.err
    assert "error: ~nobody.png: no such file" in done.err
    assert "5 images classified in fp32, 2 unreadable" in done.err
    assert "1 file left out, not read as images: 1 .mov" in done.err


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_if_nothing_can_be_read_there_is_one_error(
    petune: Run, digits: Path, tmp_path: Path, json_flag: tuple[str, ...]
) -> None:
    (tmp_path / "empty").mkdir()
    for names in (["nowhere.png"], ["empty"], ["nowhere.png", "empty"]):
        done = petune("predict", digits, *names, *json_flag)
        assert done.code == 4
        assert done.err.count("error:") == 1
        assert "classified" not in done.err
        assert all(name in done.err for name in names)
        assert len(done.out.splitlines()) == (len(names) if json_flag else 0)


def test_the_table(petune: Run, digits: Path, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = petune("predict", digits / "adapter", *images[:2], "empty", "--top-k", 3)
    assert done.code == 4
    heading, _, *rows = done.out.splitlines()
    assert heading.replace(" ", "") == "|image|class|probability|next|"
    assert len(rows) == 2
    assert "2 images classified in fp32, 1 unreadable" in done.err
    assert "no images in empty" in done.err
    one = petune("predict", digits, images[0], "--top-k", 1)
    assert one.out.splitlines()[0].replace(" ", "") == "|image|class|probability|"


def test_control_characters_in_names_are_removed(petune: Run, digits: Path, images: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "evil"
    config = json.loads((digits / "adapter" / "adapter_config.json").read_text())
    config["metadata"]["task"]["target"]["names"] = [f"\x1b[31m{i}\u202e\nx" for i in range(10)]
    files = {p.name: p.read_bytes() for p in (digits / "adapter").iterdir() if p.name != "manifest.json"}
    write_directory(copy, files | {"adapter_config.json": json.dumps(config).encode()})
    shutil.copy(images[0], "a\x1b[2J\nb.png")
    (tmp_path / "c\x1b]0;title\x07.png").write_bytes(b"no image")
    done = petune("predict", copy, "a\x1b[2J\nb.png", "c\x1b]0;title\x07.png")
    assert done.code == 4
    assert not {"\x1b", "\u202e", "\x07"} & set(done.out + done.err)
    assert len(done.out.splitlines()) == 3
    assert "a[2J b.png" in done.out


def test_from_python(digits: Path, images: list[Path]) -> None:
    array = np.asarray(Image.open(images[0]))
    of_file, of_array, of_image, wrong = public.predict(
        digits, [images[0], array, Image.open(images[0]), array.astype(np.float32)], top_k=99, device="cpu"
    )
    assert of_file.top == of_array.top == of_image.top
    assert len(of_file.top) == 10
    assert (of_array.image, wrong.image) == ("image 1", "image 3")
    assert "uint8" in wrong.error
    assert public.predict(digits, str(images[0]), top_k=1, device="cpu")[0].top[0] == of_file.top[0]
    assert len(public.predict(digits, images[0].parent, device="cpu")) == 5


def test_the_transform_of_an_adapter() -> None:
    sizes = {"image_size": 224, "mean": [0.5] * 3, "std": [0.5] * 3}

    def transform(preprocess: dict[str, Any], dataset: str = "folder:pets") -> ImageTransform:
        return ImageTransform.from_metadata({"preprocess": preprocess, "dataset": dataset})

    assert transform(sizes).stored_size == 256
    assert transform(sizes, "cifar10").stored_size == 32
    recorded = transform(sizes | {"stored_size": 64, "crop": 1.0})
    assert (recorded.stored_size, recorded.crop) == (64, 1.0)
    with pytest.raises(public.PetuneError, match="preprocessed"):
        ImageTransform.from_metadata({"preprocess": {"image_size": 224}})


def test_invalid_arguments(petune: Run, digits: Path, tmp_path: Path) -> None:
    assert petune("predict", digits).code == 2
    assert petune("predict", digits, "x.png", "--top-k", 0).code == 2
    none = petune("predict", "nowhere", "x.png")
    assert (none.code, "adapter directory" in none.err) == (4, True)
    device = petune("predict", digits, "x.png", "--device", "abacus")
    assert (device.code, "abacus" in device.err) == (2, True)
