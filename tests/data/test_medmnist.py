"""The datasets of MedMNIST, from tiny files in the published format."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import petune
from petune.base.errors import ConfigError, DataError, MissingExtra, UnknownName
from petune.data import load_dataset
from petune.data.lookup import dataset_target, find_dataset
from tests.program import call

pytest.importorskip("medmnist")


def _write(file: Path, labels: int, *, columns: int = 1, color: bool = False, side: int = 28) -> None:
    """Write train, val and test in MedMNIST's format: labels are (N, 1), or (N, C) for several labels."""
    arrays = {}
    for number, part in enumerate(("train", "val", "test")):
        count = 2 * labels
        generator = np.random.default_rng(number)
        arrays[f"{part}_images"] = generator.integers(0, 256, (count, side, side, 3)[: 4 if color else 3], np.uint8)
        values = np.arange(count)[:, None] % labels
        arrays[f"{part}_labels"] = (values == np.arange(columns) if columns > 1 else values).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "labels", "columns", "color"),
    [
        ("pathmnist", 9, 1, True),
        ("breastmnist", 2, 1, False),
        ("retinamnist", 5, 1, True),  # ordinal: its grades are classes
        ("chestmnist", 14, 14, False),
    ],
)
def test_files_as_published(name: str, labels: int, columns: int, color: bool, tmp_path: Path) -> None:
    _write(tmp_path / f"{name}.npz", labels, columns=columns, color=color)
    dataset = load_dataset(f"medmnist:{name}", tmp_path)
    assert dataset.target == dataset_target(f"medmnist:{name}", tmp_path)
    assert len(dataset.target.names) == labels
    for split in (dataset.train, dataset.val, dataset.test):
        assert split.images.shape == (2 * labels, 28, 28, 3)
    with np.load(tmp_path / f"{name}.npz") as arrays:
        stored, read = arrays["test_images"], np.asarray(dataset.test.images)
        assert np.array_equal(read if color else read[..., 1], stored)
        expected = arrays["test_labels"] if columns > 1 else arrays["test_labels"][:, 0]
        assert dataset.test.targets.tolist() == expected.tolist()
    assert dataset.target.kind == ("multi_hot" if columns > 1 else "class")
    assert dataset.license.startswith("CC BY")


def test_sizes_are_files_of_their_own(tmp_path: Path) -> None:
    _write(tmp_path / "medmnist" / "bloodmnist_64.npz", 8, color=True, side=64)
    assert find_dataset("medmnist:bloodmnist,size=64", tmp_path) == str(tmp_path / "medmnist" / "bloodmnist_64.npz")
    assert find_dataset("medmnist:bloodmnist", tmp_path) is None
    assert load_dataset("medmnist:bloodmnist,size=64", tmp_path).train.images.shape[1:] == (64, 64, 3)


def test_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "breastmnist.npz", 2)
    done = call(
        "run", "--dataset", "medmnist:breastmnist", "--data-dir", tmp_path, "--backbone", "vit_nano", "--epochs", 1,
        "--device", "cpu", "--output", tmp_path / "run", capture=capsys,
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = json.loads(call("datasets", "medmnist", "--data-dir", tmp_path, "--json", capture=capsys).out)
    assert len(rows) == 12
    assert [row["name"] for row in rows if row["found"]] == ["medmnist:breastmnist"]


def test_thresholds_chosen_on_val_are_kept_when_val_trains_too(tmp_path: Path) -> None:
    _write(tmp_path / "chestmnist.npz", 14, columns=14)
    states = {}
    for final_fit in ("none", "train+val"):
        petune.run(
            method="linear", dataset="medmnist:chestmnist", data_dir=tmp_path, backbone="vit_nano", weights="none",
            backbone_options={"depth": 1, "embed_dim": 24, "num_heads": 2}, device="cpu", final_fit=final_fit,
            task="multi_label:threshold=per_class", train={"epochs": 1, "lr": 0.1}, output=tmp_path / final_fit,
        )  # fmt: skip
        config = json.loads((tmp_path / final_fit / "adapter" / "adapter_config.json").read_text())
        states[final_fit] = config["metadata"]["task"]["state"]
    assert states["none"]["thresholds"] == states["train+val"]["thresholds"]
    assert len(set(states["none"]["thresholds"])) > 1


def test_what_is_wrong_is_said_before_a_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(text: str, error: type[Exception], *words: str) -> None:
        with pytest.raises(error) as caught:
            petune.run(dataset=text, data_dir=tmp_path, backbone="vit_nano", output=tmp_path / "run")
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert not (tmp_path / "run" / "checkpoints").exists()

    monkeypatch.setattr("petune.data.readers.medmnist.reachable", lambda url: False)
    refused("medmnist:pathmnst", UnknownName, "pathmnist")
    refused("medmnist:organmnist3d", ConfigError, "3D")
    refused("medmnist:pathmnist,size=30", ConfigError, "size")
    refused("medmnist:pathmnist", DataError, "pathmnist.npz", str(tmp_path), "zenodo")
    (tmp_path / "pathmnist.npz").write_bytes(b"PK cut short")
    refused("medmnist:pathmnist", DataError, "pathmnist.npz", "again")
    _write(tmp_path / "chestmnist.npz", 14)  # one label an image instead of 14
    refused("medmnist:chestmnist", DataError, "14 labels")
    monkeypatch.setitem(sys.modules, "medmnist.info", None)
    refused("medmnist:pathmnist", MissingExtra, "petune[data]")
