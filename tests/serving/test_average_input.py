"""Averages of what cannot be averaged, or only with care: nothing is written, or a note says what to know."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import petune
from tests.serving.averages import FILE, X, adapter, backbone, tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters to refuse. Read them, do not write to them."""
    folder = tmp_path_factory.mktemp("made")
    methods = {"a": "bitfit", "b": "bitfit", "norm": "norm", "last": "bitfit:blocks=last:1"}
    for seed, (name, method) in enumerate(methods.items()):
        adapter(folder / name, method, seed)
    for seed in (0, 1):
        adapter(folder / f"random{seed}", "adaptformer:bottleneck=4", seed)
    return folder


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "one": ("a", {}, "one adapter is given"),
    "none": ("", {}, "no adapter is given"),
    "twice": ("a a", {}, "named twice"),
    "method": ("a norm", {}, "bitfit, and .* norm"),
    "options": ("a last", {}, "other options .*blocks"),
    "algorithm": ("a b", {"algorithm": "unifrom"}, "Did you mean uniform"),
    "coefficients": ("a b", {"coefficients": [1, 2, 3]}, "3 coefficients for 2"),
    "not finite": ("a b", {"coefficients": [1, float("inf")]}, "finite"),
    "negative": ("a b", {"coefficients": [1, -2]}, "not negative"),
    "share": ("a b", {"algorithm": "wise_ft", "coefficients": [1.5]}, "0 to 1"),
    "density": ("a b", {"density": 0.5}, "density is for ties and dare"),
    "density 0": ("a b", {"algorithm": "ties", "density": 0}, "above 0"),
    "rank": ("a b", {"rank": 2}, "rank is for the products of LoRA"),
    "factors": ("a b", {"by_factors": True}, "by_factors is for LoRA"),
    "head": ("a b", {"head": "nowhere"}, "none of the averaged directories"),
    "val": ("a b", {"algorithm": "greedy"}, "there is no config.yaml in"),
    "seeds": ("random0 random1", {"algorithm": "ties"}, r"other seeds \(0, 1\)"),
    "seed": ("a b", {"algorithm": "dare", "seed": 2**70}, "64 bits"),
    "start": ("a b", {"start": "a"}, "uniform needs no start"),
    "not a start": ("a b", {"start": "a", "algorithm": "ties"}, "does not continue a: its run"),
    "missing": ("a nowhere", {}, "nowhere"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_writes_nothing(name: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    places, options, message = REFUSED[name]
    with pytest.raises(petune.PetuneError, match=message):
        petune.average_adapters(places.split(), "out", **options)
    assert not Path("out").exists()


def test_an_output_inside_a_file(made: Path) -> None:
    with pytest.raises(petune.UsageError, match=r"manifest\.json is not a directory"):
        petune.average_adapters([made / "a", made / "b"], made / "a" / "manifest.json" / "x" / "y")


def test_an_output_that_exists(made: Path) -> None:
    before = (made / "a" / FILE).read_bytes()
    with pytest.raises(petune.UsageError, match="exists"):
        petune.average_adapters([made / "a", made / "b"], made / "a")
    assert (made / "a" / FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("method", "algorithm", "numbers"),
    [
        ("bitfit", "task_arithmetic", {"coefficients": [1e45, 1.0]}),
        ("bitfit", "task_arithmetic", {"coefficients": [10**400, 1]}),
        ("bitfit", "ties", {"coefficients": [1e300]}),
        ("bitfit", "dare", {"density": 1e-300, "seed": 3}),
        ("lora:r=2", "task_arithmetic", {"coefficients": [1e300, -1e308]}),
        ("lora:r=2", "ties", {"coefficients": [1e200]}),
    ],
)
def test_an_overflow_writes_nothing(method: str, algorithm: str, numbers: dict[str, Any], tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(seed), method, seed) for seed in (0, 1)]
    with pytest.raises(petune.UsageError, match="coefficients"):
        petune.average_adapters(paths, tmp_path / "out", algorithm=algorithm, **numbers)
    assert not (tmp_path / "out").exists()


def test_relative_weights_of_any_size(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(seed), "bitfit", seed) for seed in (0, 1)]
    done = petune.average_adapters(paths, tmp_path / "out", coefficients=[1e308, 1e308])
    assert [a.coefficient for a in done.adapters] == [0.5, 0.5]
    a, b, out = (tensors(path) for path in (*paths, tmp_path / "out"))
    for key in out:
        torch.testing.assert_close(out[key], (a[key] + b[key]) / 2)


def test_a_copy_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "a", tmp_path / "copy")
    with pytest.raises(petune.UsageError, match="same tensors as"):
        petune.average_adapters([made / "a", tmp_path / "copy"], tmp_path / "out")


def test_unknown_starts_are_no_fact(tmp_path: Path) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        petune.attach(backbone().model, "adaptformer:bottleneck=4").save(tmp_path / str(seed))
    done = petune.average_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "out", model=backbone().model)
    assert "do not record what they started from" in " ".join(done.notes)


def test_a_rank_that_no_change_can_have_is_refused(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(seed), "lora:r=2", seed) for seed in (0, 1)]
    with pytest.raises(petune.UsageError, match="rank is 1,000,000,000"):
        petune.average_adapters(paths, tmp_path / "out", rank=10**9)
    with pytest.raises(petune.UsageError, match="rank is 1,000,000,000"):
        petune.convert(paths[0], tmp_path / "out", rank=10**9)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("converted_first", [False, True])
def test_a_converted_lora_beside_a_plain_one(converted_first: bool, tmp_path: Path) -> None:
    paths = [adapter(tmp_path / str(seed), "lora:r=2", seed) for seed in (0, 1)]
    petune.average_adapters(paths, tmp_path / "expected")
    petune.convert(paths[0], tmp_path / "converted")
    mixed = [tmp_path / "converted", paths[1]]
    petune.average_adapters(mixed if converted_first else mixed[::-1], tmp_path / "out")
    outputs = [petune.load(backbone().model, tmp_path / name).model.eval()(X) for name in ("out", "expected")]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
    some = adapter(tmp_path / "some", "lora:r=2,target_modules=[qkv]", 2)
    with pytest.raises(petune.UsageError):
        petune.average_adapters([*mixed, some], tmp_path / "refused")


@pytest.mark.parametrize("algorithm", ["uniform", "task_arithmetic"])
def test_metadata_of_another_form(algorithm: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        att = petune.attach(backbone().model, "bitfit")
        torch.nn.init.constant_(next(iter(att.tuned.values())), seed + 1.0)
        att.save(tmp_path / str(seed), metadata={"preprocess": "imagenet", "backbone": "vit", "training": [seed]})
    paths = [tmp_path / "0", tmp_path / "1"]
    petune.average_adapters(paths, tmp_path / "out", algorithm=algorithm, model=backbone().model)
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "0").keys()
