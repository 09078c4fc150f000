"""Datasets by name: how a name is read, what is listed, and plugins, sound and broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import petune
from petune.base.errors import ConfigError, DataError, PetuneError, PluginError, UnknownName, UsageError
from petune.data import load_dataset
from petune.data.lookup import count_classes, find_dataset, is_training_dataset, manifest_of
from petune.data.registry import DatasetName, build_reader, complete_name, list_datasets, parse_dataset
from petune.runner.run_config import RunConfig
from tests.program import call

Fake = Callable[..., None]
GROUP = "petune.datasets"
BLOBS = """
import numpy as np
import petune

class BlobsConfig(petune.ReaderConfig):
    count: int = 30
    names: tuple[str, ...] = ("dark", "light")

class Blobs(petune.DatasetReader[BlobsConfig]):
    about = "dark and light squares"
    needs = "nothing"

    def load(self, context: petune.ReadContext) -> petune.Dataset:
        labels = np.arange(self.config.count) % 2
        noise = np.random.default_rng(0).integers(0, 100, (self.config.count, 8, 8, 3))
        images = (noise + 150 * labels[:, None, None, None]).astype(np.uint8)
        train = petune.Split.of(images, labels)
        empty = train.take(np.arange(0))
        target = petune.Target("class", self.config.names)
        return petune.Dataset("blobs", target, "made", "none", train, empty, empty).with_test()
"""


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(("bee", "cat")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.full((8, 8, 3), 99 * label + i, np.uint8)).save(tmp_path / "pets" / name / f"{i}.png")
    return tmp_path / "pets"


NAMES = {
    "cifar10": ("cifar10", ""),
    "folder:a/b": ("folder", "a/b"),
    "folder:C:/pets": ("folder", "C:/pets"),
    "table:a.csv,label=breed": ("table", "a.csv", "label=breed"),
    "table:a.csv,labels=[cat,dog],weight=w": ("table", "a.csv", "labels=[cat,dog],weight=w"),
    "folder:a,b": ("folder", "a,b"),
    "folder:x=1,b,c=2": ("folder", "x=1,b", "c=2"),
    "leaves,season=fall": ("leaves", "", "season=fall"),
    "folder:a,2x=3": ("folder", "a,2x=3"),
}


@pytest.mark.parametrize(("text", "parts"), NAMES.items(), ids=NAMES)
def test_a_name_has_an_argument_and_options(text: str, parts: tuple[str, ...]) -> None:
    assert parse_dataset(text) == DatasetName(*parts)


def test_a_path_with_the_text_of_an_option_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b=c").mkdir()
    assert parse_dataset("folder:a,b=c") == DatasetName("folder", "a,b=c")
    assert parse_dataset("a,b=c") == DatasetName("folder", "a,b=c")


def test_a_plain_path_is_a_folder_or_table(pets: Path) -> None:
    (pets.parent / "a.CSV").touch()
    assert parse_dataset("pets") == DatasetName("folder", "pets")
    assert parse_dataset("a.CSV,label=x") == DatasetName("table", "a.CSV", "label=x")
    assert complete_name(str(pets)) == f"folder:{pets}"
    assert complete_name("a.CSV,label=x") == "table:a.CSV,label=x"
    assert RunConfig(dataset="pets").dataset == RunConfig(dataset="folder:pets").dataset == "folder:pets"
    assert petune.PretrainConfig(dataset="pets").dataset == "folder:pets"
    assert load_dataset("pets").classes == ("bee", "cat")
    assert find_dataset("pets") == "pets"
    assert manifest_of("pets") == manifest_of(f"folder:{pets}") != {}
    assert is_training_dataset("pets", f"folder:{pets}", {})


def test_a_registered_name_comes_before_a_folder_of_that_name(pets: Path) -> None:
    pets.rename("digits")
    assert complete_name("digits") == "digits"
    assert build_reader("digits").path is None
    assert complete_name("./digits") == "folder:./digits"


WRONG = {
    "digit": (UnknownName, "no such dataset: digit. Did you mean digits"),
    "": (UnknownName, "no such dataset"),
    "./nowhere": (DataError, "no such file or folder: ./nowhere"),
    "notes.txt": (DataError, "notes.txt is neither a folder nor a table"),
    "folder": (ConfigError, "folder needs a PATH. Write folder:PATH"),
    "folder:": (ConfigError, "folder needs a PATH. Write folder:PATH"),
    "digits:x": (ConfigError, "takes nothing after a colon.*Write digits"),
    "digits:a=1": (ConfigError, "Write digits,a=1"),
    "digits,seed=1": (ConfigError, "no such key: seed"),
    "x" * 5000: (UnknownName, "no such dataset"),
    "folder:" + "x" * 5000: (DataError, "cannot be a path: it has 5,000 letters"),
    "hf:" + "x" * 5000: (DataError, "cannot be a path"),
    "folder:\0": (UsageError, "null character"),
}


@pytest.mark.parametrize(("text", "expected"), WRONG.items(), ids=[text[:20] for text in WRONG])
def test_wrong_names_say_what_to_write(
    text: str, expected: tuple[type[PetuneError], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(expected[0], match=expected[1]):
        load_dataset(text)


def test_the_built_in_ones_are_listed() -> None:
    records = {record.name: record for record in list_datasets() if record.is_own}
    assert {"cifar10", "cifar100", "digits", "folder"} <= set(records)
    assert {record.state for record in records.values()} == {"ok"}
    assert all(record.about for record in records.values())
    assert (records["folder"].argument, records["folder"].usage) == ("PATH", "folder:PATH")


def test_a_plugin_is_listed_loaded_and_trained_on(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fake("petune-fake", {"blobs": "petune_fake_blobs:Blobs"}, BLOBS, group=GROUP)
    record = next(record for record in list_datasets() if record.name == "blobs")
    assert (record.about, record.needs, record.distribution, record.version, record.state) == (
        *("dark and light squares", "nothing", "petune-fake", "1.5", "ok"),
    )
    assert len(load_dataset("blobs,count=50").train) == 40
    assert count_classes("blobs") == 2
    with pytest.raises(ConfigError, match="Did you mean count"):
        load_dataset("blobs,cuont=50")
    listing = call("datasets", capture=capfd)
    assert "petune-fake 1.5" in listing.out
    options = ("--weights", "none", "--set", "backbone_options.depth=1", "--epochs", "1", "--output", "run")
    done = call("run", "--method", "linear", "--backbone", "vit_nano", "--dataset", "blobs", *options, capture=capfd)
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "result.json").is_file()
    assert petune.evaluate("run", device="cpu").num_images == 6


SOUND_HEAD = "import petune\nclass Bad(petune.DatasetReader[petune.ReaderConfig]):\n"
BROKEN = {
    "import error": ("import petune_that_is_not_there", "ModuleNotFoundError"),
    "exits": ("import sys\nsys.exit(7)", "SystemExit: 7"),
    "wrong type": ("class Bad: pass", "no subclass of petune.DatasetReader"),
    "no config": ("import petune\nclass Bad(petune.DatasetReader): pass", "names no config class"),
    "fails in load": (SOUND_HEAD + "    def load(self, context): 1 / 0", "failed when it was read: ZeroDivisionError"),
    "fails in init": (SOUND_HEAD + "    def __init__(self, *a): 1 / 0", "failed when it was made: ZeroDivisionError"),
    "returns another type": (SOUND_HEAD + "    def load(self, context): return 3", "returned a int"),
    "exits in load": (
        SOUND_HEAD + "    def load(self, context): raise SystemExit(0)",
        "when it was read: SystemExit: 0",
    ),
    "no load": (SOUND_HEAD + "    pass", "must define load"),
}


@pytest.mark.parametrize(("code", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_one_error_that_names_the_package(fake: Fake, code: str, message: str) -> None:
    fake("petune-fake", {"bad": "petune_fake_bad:Bad"}, code, group=GROUP)
    with pytest.raises(PluginError, match=message) as caught:
        load_dataset("bad")
    assert "fake" in str(caught.value)
    states = {record.name: record.state for record in list_datasets()}
    assert states["digits"] == "ok"
    assert states["bad"] == "ok" or message in states["bad"]


def test_a_plugin_cannot_take_a_built_in_name_and_two_cannot_share_one(fake: Fake) -> None:
    fake("petune-fake", {"digits": "petune_fake:Blobs", "twin": "petune_fake:Blobs"}, BLOBS, group=GROUP)
    fake("petune-rival", {"twin": "petune_fake_rival:Blobs"}, BLOBS, group=GROUP)
    assert type(build_reader("digits")).__module__ == "petune.data.readers.digits"
    with pytest.raises(PluginError, match="both register the dataset 'twin'"):
        build_reader("twin")
    states = {(record.name, record.distribution): record.state for record in list_datasets()}
    assert states["digits", "petune-fake"] == "unusable: petune has a dataset 'digits' of its own"
    assert states["twin", "petune-rival"] == "unusable: name is taken twice"


def test_what_a_plugin_returns_is_checked(fake: Fake) -> None:
    fake("petune-fake", {"blobs": "petune_fake_blobs:Blobs"}, BLOBS, group=GROUP)
    with pytest.raises(DataError, match="no training images for grey"):
        load_dataset("blobs,names=[dark,light,grey]")
