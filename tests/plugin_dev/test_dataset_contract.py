"""The contract of datasets: sound ones meet it, and each property catches a broken reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import petune
from petune.plugin_dev.dataset_contract import PROPERTIES, examine_dataset
from petune.plugin_dev.finding import Finding

CONTEXT = petune.ReadContext()


class Stripes(petune.DatasetReader[petune.ReaderConfig]):
    """Images of two classes, all of which differ."""

    about = "made-up images"

    def target(self, context: petune.ReadContext) -> petune.Target:
        return petune.Target("class", ("a", "b"))

    def load(self, context: petune.ReadContext) -> petune.Dataset:
        labels = np.arange(40) % 2
        images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
        train = petune.Split.of(images, labels)
        empty = train.take(np.arange(0))
        return petune.Dataset("stripes", self.target(CONTEXT), "here", "none", train, empty, empty).with_test()


class NoDescription(Stripes):
    about = ""


class NoPlace(Stripes):
    def find(self, data_dir: Any) -> Any:
        return 3


class FlatImages(Stripes):
    def load(self, context: petune.ReadContext) -> petune.Dataset:
        whole = super().load(context)
        return replace(whole, train=replace(whole.train, images=whole.train.images[:].reshape(40, -1)), val=whole.test)


class OtherNames(Stripes):
    def target(self, context: petune.ReadContext) -> petune.Target:
        return petune.Target("class", ("a", "b") if context is CONTEXT else ("b", "a"))


class Shuffled(Stripes):
    def load(self, context: petune.ReadContext) -> petune.Dataset:
        whole = super().load(context)
        return replace(whole, train=whole.train.take(np.random.default_rng().permutation(len(whole.train))))


class Leaks(Stripes):
    def load(self, context: petune.ReadContext) -> petune.Dataset:
        whole = super().load(context)
        return replace(whole, test=whole.train.take(np.arange(5)))


class Blank(Stripes):
    def load(self, context: petune.ReadContext) -> petune.Dataset:
        whole = super().load(context)
        images = np.zeros((40, 8, 8, 3), np.uint8)
        return replace(whole, train=replace(whole.train, images=images), test=replace(whole.test, images=images))


class NoAugmentation(Stripes):
    def load(self, context: petune.ReadContext) -> petune.Dataset:
        return replace(super().load(context), augment="crip")


class Clock(Stripes):
    def manifest(self, data_dir: Any) -> Any:
        return {"train": {"a": str(np.random.default_rng().random())}}


class StripedClips(Stripes):
    def load(self, context: petune.ReadContext) -> petune.Dataset:
        whole = super().load(context)
        clips = np.repeat(np.asarray(whole.train.images)[:, None], 3, axis=1)
        return replace(whole, train=replace(whole.train, images=clips), test=replace(whole.test, images=clips))

    def num_frames(self, context: petune.ReadContext) -> int:
        return 3


class NoFrames(StripedClips):
    def num_frames(self, context: petune.ReadContext) -> None:  # type: ignore[override]
        return None


CASES = [
    (NoDescription, "description"), (NoPlace, "location"), (FlatImages, "images and targets"),
    (NoAugmentation, "images and targets"), (NoFrames, "images and targets"),
    (OtherNames, "names before images"), (Shuffled, "same images twice"), (Leaks, "separate splits"),
    (Blank, "pixels"), (Clock, "manifest"),
]  # fmt: skip


def broken(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings if finding.problem]


def test_every_property_has_a_case() -> None:
    assert {name for _, name in CASES} == {prop.name for prop in PROPERTIES}


@pytest.mark.parametrize(("reader", "name"), CASES, ids=[reader.__name__ for reader, _ in CASES])
def test_a_broken_reader_is_caught(reader: type[Stripes], name: str) -> None:
    assert name in broken(list(examine_dataset(reader())))
    with pytest.raises(petune.ContractViolation):
        petune.check_dataset(reader())


@pytest.mark.parametrize("dataset", ["digits", Stripes(), StripedClips()])
def test_sound_datasets_meet_the_contract(dataset: Any) -> None:
    assert petune.check_dataset(dataset) == [prop.name for prop in PROPERTIES]


def test_an_error_of_a_reader_is_a_finding(fake: Callable[..., None]) -> None:
    code = (
        "import petune\n"
        "class Fake(petune.DatasetReader[petune.ReaderConfig]):\n"
        "    about = 'none'\n"
        "    def load(self, context): raise petune.DataError('the files are gone')\n"
    )
    fake("petune-fake", {"fake": "petune_fake:Fake"}, code, group="petune.datasets")
    problems = [finding.problem for finding in examine_dataset("fake") if finding.problem]
    assert problems
    assert all("the files are gone" in problem for problem in problems)


def test_names_that_nobody_registered_are_refused() -> None:
    with pytest.raises(petune.UnknownName):
        petune.check_dataset("digitz")
