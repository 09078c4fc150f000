"""The datasets of torchvision: the table is complete, and tiny files in the published layouts are read right."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import petune
from petune.base.errors import ConfigError, DataError, UnknownName
from petune.data import load_dataset
from petune.data.lookup import dataset_target, find_dataset
from petune.data.on_request import OnRequest
from petune.data.torchvision_table import NOT_LABELED, TABLE, VOC_CLASSES
from tests.program import call

DEBIAN = [Path("/usr/share/datasets"), Path("/work/fixtures/fm/usr/share/datasets")]
SIDE = 16
Write = Callable[[Path], None]


def _image(path: Path, value: int, size: tuple[int, int] = (SIDE, SIDE)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 30, (size[1], size[0], 3))
    Image.fromarray((noise + value % 200).astype(np.uint8)).save(path)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _mat(path: Path, **arrays: Any) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, arrays)


@pytest.fixture(autouse=True)
def any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision accept files that are not the published ones."""
    for module in ("cifar", "flowers102", "fer2013", "celeba", "svhn"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).exists()
        )


def test_every_dataset_of_torchvision_is_in_the_table_or_cannot_be_trained_on() -> None:
    from torchvision import datasets

    assert set(datasets.__all__) == {*TABLE, *NOT_LABELED}
    assert not TABLE.keys() & NOT_LABELED.keys()
    assert len(TABLE) == 39


def _cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (10, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))


def _dtd(root: Path) -> None:
    for part in ("train", "val", "test"):
        lines = [f"{name}/{name}_{part}.png" for name in ("dotted", "woven")]
        _write(root / "dtd/dtd/labels" / f"{part}1.txt", "\n".join(lines) + "\n")
        for value, line in enumerate(lines):
            _image(root / "dtd/dtd/images" / line, 90 * value + len(part))


def _flowers(root: Path) -> None:
    folder = root / "flowers-102"
    for number in range(1, 205):
        _image(folder / "jpg" / f"image_{number:05d}.jpg", number, (20, 12))
    _mat(folder / "imagelabels.mat", labels=np.arange(204) % 102 + 1)
    _mat(folder / "setid.mat", trnid=np.arange(1, 103), valid=np.array([103, 104]), tstid=np.array([105, 106, 107]))


def _eurosat(root: Path) -> None:
    for label, name in enumerate(("AnnualCrop", "Forest", "River")):
        for number in range(5):
            _image(root / "eurosat/2750" / name / f"{name}_{number}.png", 50 * label + number, (64, 64))


def _gtsrb(root: Path) -> None:
    folder = root / "gtsrb"
    for number in range(43):
        _image(folder / "GTSRB/Training" / f"{number:05d}" / "00000_00000.ppm", number)
    for number in range(2):
        _image(folder / "GTSRB/Final_Test/Images" / f"{number:05d}.ppm", number)
    _write(folder / "GT-final_test.csv", "Filename;ClassId\n00000.ppm;7\n00001.ppm;42\n")


def _pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    for part in ("trainval", "test"):
        lines = []
        for number, (breed, animal) in enumerate((("Abyssinian", 1), ("pug", 2))):
            name = f"{breed}_{part}"
            lines.append(f"{name} {number + 1} {animal} 1")
            _image(folder / "images" / f"{name}.jpg", 60 * number, (24, 16))
            trimap = np.full((16, 24), 2, np.uint8)
            trimap[4:12, 8:16], trimap[4, 8:16] = 1, 3
            path = folder / "annotations/trimaps" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(trimap).save(path)
        _write(folder / "annotations" / f"{part}.txt", "\n".join(lines) + "\n")


def _voc(root: Path) -> None:
    folder = root / "VOCdevkit/VOC2012"
    for part in ("train", "val"):
        names = [f"{part}_{number}" for number in range(20)]
        for kind in ("Segmentation", "Main"):
            _write(folder / "ImageSets" / kind / f"{part}.txt", "\n".join(names) + "\n")
        for number, name in enumerate(names):
            _image(folder / "JPEGImages" / f"{name}.jpg", number)
            mask = Image.fromarray(np.full((SIDE, SIDE), number + 1, np.uint8), "P")
            mask.putpalette([(value * 37) % 256 for value in range(768)])
            mask.paste(255, (0, 0, SIDE, 2))
            (folder / "SegmentationClass").mkdir(exist_ok=True)
            mask.save(folder / "SegmentationClass" / f"{name}.png")
            objects = [(VOC_CLASSES[number], 0), (VOC_CLASSES[0], 0), (VOC_CLASSES[5], 1)]
            boxes = "".join(f"<object><name>{n}</name><difficult>{d}</difficult></object>" for n, d in objects)
            _write(folder / "Annotations" / f"{name}.xml", f"<annotation>{boxes}</annotation>")


def _clevr(root: Path) -> None:
    folder = root / "clevr/CLEVR_v1.0"
    for part in ("train", "val"):
        scenes = []
        for number in range(8):
            name = f"CLEVR_{part}_{number:06d}.png"
            _image(folder / "images" / part / name, number)
            scenes.append({"image_filename": name, "objects": [{}] * (number + 3)})
        _write(folder / "scenes" / f"CLEVR_{part}_scenes.json", json.dumps({"scenes": scenes}))


def _celeba(root: Path) -> None:
    folder = root / "celeba"
    names = [f"{number:06d}.jpg" for number in range(1, 7)]
    for number, name in enumerate(names):
        _image(folder / "img_align_celeba" / name, number, (18, 22))
    parts = "".join(f"{name} {number // 2}\n" for number, name in enumerate(names))
    _write(folder / "list_eval_partition.txt", parts)
    _write(folder / "identity_CelebA.txt", "".join(f"{name} 1\n" for name in names))
    for file, header in (("list_bbox_celeba.txt", "image_id a b"), ("list_landmarks_align_celeba.txt", "a b")):
        _write(folder / file, f"6\n{header}\n" + "".join(f"{name} 1 2\n" for name in names))
    rows = "".join(f"{name} {1 if number % 2 else -1} {-1 if number % 2 else 1}\n" for number, name in enumerate(names))
    _write(folder / "list_attr_celeba.txt", f"6\nSmiling Young\n{rows}")


def _svhn(root: Path) -> None:
    for part in ("train", "test"):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
        _mat(root / f"{part}_32x32.mat", X=pixels, y=np.arange(1, 11)[:, None])


# name, files, kind and number of targets, images of train, val and test, side stored for images of 16 pixels
LAYOUTS: dict[str, tuple[Write, tuple[str, int], tuple[int, int, int], int]] = {
    "CIFAR10": (_cifar10, ("class", 10), (50, 0, 10), 32),
    "CLEVRClassification": (_clevr, ("class", 8), (8, 0, 8), 19),
    "CLEVRClassification,target=number": (_clevr, ("number", 1), (8, 0, 8), 19),
    "CelebA": (_celeba, ("multi_hot", 2), (2, 2, 2), 19),
    "DTD": (_dtd, ("class", 2), (2, 2, 2), 19),
    "EuroSAT": (_eurosat, ("class", 3), (12, 0, 3), 64),
    "Flowers102": (_flowers, ("class", 102), (102, 2, 3), 19),
    "GTSRB": (_gtsrb, ("class", 43), (43, 0, 2), 19),
    "OxfordIIITPet": (_pets, ("class", 2), (2, 0, 2), 19),
    "OxfordIIITPet,target=binary-category": (_pets, ("class", 2), (2, 0, 2), 19),
    "OxfordIIITPet,target=segmentation": (_pets, ("mask", 2), (2, 0, 2), 19),
    "SVHN": (_svhn, ("class", 10), (10, 0, 10), 32),
    "VOCDetection,variant=2012": (_voc, ("multi_hot", 20), (20, 0, 20), 19),
    "VOCSegmentation": (_voc, ("mask", 21), (20, 0, 20), 19),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, (kind, number), sizes, side = LAYOUTS[name]
    write(tmp_path)
    text = f"torchvision:{name}"
    dataset = load_dataset(text, tmp_path, image_size=16)
    assert dataset_target(text, tmp_path) == dataset.target
    assert (dataset.target.kind, len(dataset.target.names)) == (kind, number)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == sizes
    assert dataset.train.images.shape[1:] == (side, side, 3)
    assert dataset.source.partition("; ")[0] == find_dataset(text, tmp_path)
    again = load_dataset(text, tmp_path, image_size=16)
    assert np.array_equal(again.train.images[again.train.rows], dataset.train.images[dataset.train.rows])
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "another cache"))
    on_request = load_dataset(text, tmp_path, image_size=16, cache_gb=0)
    assert isinstance(on_request.train.images, OnRequest)
    assert "decoded in every epoch" in on_request.source
    for part in ("train", "test"):
        mine, theirs = getattr(on_request, part), getattr(dataset, part)
        assert np.array_equal(mine.rows, theirs.rows)
        assert np.array_equal(mine.targets, theirs.targets)
        assert np.array_equal(mine.images[mine.rows], theirs.images[theirs.rows])


def test_targets_are_those_of_the_files(tmp_path: Path) -> None:
    _flowers(tmp_path)
    _gtsrb(tmp_path)
    _voc(tmp_path)
    _celeba(tmp_path)
    _svhn(tmp_path)
    assert load_dataset("torchvision:Flowers102", tmp_path, 16).test.targets.tolist() == [2, 3, 4]
    signs = load_dataset("torchvision:GTSRB", tmp_path, 16)
    assert signs.test.targets.tolist() == [7, 42]
    assert signs.train.names is not None
    assert signs.train.names[3].endswith("00003/00000_00000.ppm")
    data = load_dataset("torchvision:VOCDetection", tmp_path, 16)
    assert "variant 2012" in data.source  # 2007 comes first, but is not here
    with pytest.raises(DataError, match=r"2007.*VOC2007.*variant=2012"):
        load_dataset("torchvision:VOCDetection,variant=2007", tmp_path, 16)
    objects = data.train.targets
    assert np.flatnonzero(objects[3]).tolist() == [0, 3]  # the difficult object does not count
    assert load_dataset("torchvision:CelebA", tmp_path, 16).train.targets.tolist() == [[0, 1], [1, 0]]
    assert load_dataset("torchvision:SVHN", tmp_path, 16).train.targets.tolist() == [*range(1, 10), 0]


def test_masks_follow_their_images(tmp_path: Path) -> None:
    _pets(tmp_path)
    train = load_dataset("torchvision:OxfordIIITPet,target=segmentation", tmp_path, 14).train  # stored at 16
    mask = train.targets_at(np.array([0]))[0]
    assert mask.shape == (16, 16)
    assert np.unique(mask).tolist() == [0, 1, 255]  # pet, background, and the border that does not count
    assert (mask[5:12, 4:12] == 0).all()  # columns 8 to 15 of 24, in the center square
    assert (mask[4, 4:12] == 255).all()
    _voc(tmp_path)
    masks = load_dataset("torchvision:VOCSegmentation", tmp_path, 14).train
    assert np.unique(masks.targets_at(np.array([6]))).tolist() == [7, 255]  # numbers of the palette, not its colors


def test_letters_of_emnist_start_at_class_0_and_are_upright() -> None:
    letters = TABLE["EMNIST"]
    shift = letters.splits["letters"].train["target_transform"]
    assert [shift(1), shift(26)] == [0, 25]
    lying = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert np.asarray(letters.upright(lying)).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_classes_of_imagenet_with_the_same_words_are_told_apart(tmp_path: Path) -> None:
    words = {"n01440764": ("tench", "Tinca tinca"), "n02012849": ("crane",), "n03126707": ("crane",)}
    for part in ("train", "val"):
        for number, wnid in enumerate(words):
            for i in range(2):
                _image(tmp_path / "imagenet" / part / wnid / f"{i}.JPEG", 60 * number + i)
    torch.save((words, []), tmp_path / "imagenet" / "meta.bin")
    names = ("tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)")
    assert load_dataset("torchvision:ImageNet", tmp_path, image_size=SIDE).classes == names
    assert dataset_target("torchvision:ImageNet", tmp_path).names == names


def test_a_dataset_without_test_split_is_cut_in_the_order_of_its_files(tmp_path: Path) -> None:
    _eurosat(tmp_path)
    copy = tmp_path / "eurosat/2750/River/River_0.png"
    (tmp_path / "eurosat/2750/River/zz.png").write_bytes(copy.read_bytes())
    dataset = load_dataset("torchvision:EuroSAT", tmp_path, 16)
    names = np.concatenate([dataset.train.names, dataset.test.names])  # type: ignore[list-item]
    assert len(set(names)) == 16
    assert not set(dataset.train.rows) & set(dataset.test.rows)


def test_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _dtd(tmp_path)
    done = call(
        "run", "--dataset", "torchvision:DTD,variant=1", "--data-dir", str(tmp_path), "--backbone", "vit_nano",
        "--epochs", "1", "--device", "cpu", "--output", str(tmp_path / "run"), capture=capsys,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert petune.evaluate(tmp_path / "run", data_dir=tmp_path).top1 is not None


def test_debians_fashion_mnist(tmp_path: Path) -> None:
    found = [path for path in DEBIAN if (path / "fashion-mnist/train-images-idx3-ubyte.gz").exists()]
    if not found:
        return
    for data_dir in (found[0], found[0] / "fashion-mnist"):
        assert find_dataset("torchvision:FashionMNIST", data_dir) == str(data_dir)
    assert dataset_target("torchvision:FashionMNIST", found[0]).names[:3] == ("T-shirt/top", "Trouser", "Pullover")


@pytest.mark.exhaustive
def test_all_of_debians_fashion_mnist() -> None:
    found = [path for path in DEBIAN if (path / "fashion-mnist/train-images-idx3-ubyte.gz").exists()]
    if not found:
        return
    dataset = load_dataset("torchvision:FashionMNIST", found[0])
    assert (len(dataset.train), len(dataset.test)) == (60_000, 10_000)
    assert np.bincount(dataset.train.targets).tolist() == [6_000] * 10
    mean, std = dataset.train.channel_statistics()
    assert mean[0] == pytest.approx(0.286, abs=0.002)
    assert std[0] == pytest.approx(0.353, abs=0.002)


def test_what_is_wrong_is_said_before_a_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(text: str, error: type[Exception], *words: str) -> None:
        with pytest.raises(error) as caught:
            petune.run(dataset=text, data_dir=tmp_path, backbone="vit_nano", output=tmp_path / "run")
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert not (tmp_path / "run").exists()

    monkeypatch.setattr("petune.data.torchvision_files.reachable", lambda url: False)
    refused("torchvision:FashionMnist", UnknownName, "FashionMNIST")
    refused("torchvision:CocoDetection", ConfigError, "boxes")
    refused("torchvision:DTD,variant=11", ConfigError, "11", "10")
    refused("torchvision:DTD,target=class", ConfigError, "class")
    refused("torchvision:DTD,varient=1", ConfigError, "variant")
    refused("torchvision:DTD", DataError, "dtd/dtd", str(tmp_path), "robots.ox.ac.uk")
    refused("torchvision:StanfordCars", DataError, "stanford_cars", "cannot download")
    (tmp_path / "dtd/dtd").mkdir(parents=True)
    refused("torchvision:DTD", DataError, "DTD", "train1.txt")


def test_broken_images_and_masks_of_another_size_are_named(tmp_path: Path) -> None:
    _pets(tmp_path)
    Image.new("L", (5, 5), 1).save(tmp_path / "oxford-iiit-pet/annotations/trimaps/pug_test.png")
    with pytest.raises(DataError, match=r"pug_test\.jpg: the mask is 5x5, but the image 24x16"):
        load_dataset("torchvision:OxfordIIITPet,target=segmentation", tmp_path, 16)
    (tmp_path / "oxford-iiit-pet/images/pug_test.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"pug_test\.jpg"):
        load_dataset("torchvision:OxfordIIITPet", tmp_path, 16)


def test_names_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _eurosat(tmp_path)
    rows = json.loads(call("datasets", "torchvision", "--data-dir", tmp_path, "--json", capture=capsys).out)
    assert [row["name"] for row in rows] == [f"torchvision:{name}" for name in TABLE]
    assert [row["name"] for row in rows if row["found"]] == ["torchvision:EuroSAT"]
    assert "39 labeled datasets" in call("datasets", capture=capsys).out
    assert call("datasets", "digits", capture=capsys).code == 2
