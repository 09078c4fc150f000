"""Inputs that the configuration does not pin: the bytes of the weights file, the recipe and options of the method."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import petune
from petune.base.errors import CheckpointError
from petune.runner.run_name import directory_name
from petune.tuners.adaptformer import AdaptFormer

OPTIONS = {"depth": 1, "embed_dim": 24}
RUN = {
    "backbone": "vit_nano", "dataset": "digits", "shots": 3, "device": "cpu", "backbone_options": OPTIONS,
    "train": {"epochs": 1, "batch_size": 10, "precision": "fp32"},
}  # fmt: skip


def _weights(file: Path, seed: int) -> str:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10, **OPTIONS)
    save_file(model.state_dict(), file)
    return str(file)


@pytest.mark.exhaustive
def test_a_changed_weights_file_is_refused(tmp_path: Path) -> None:
    """By a run, a comparison and a sweep, which would otherwise mix two backbones."""
    run = {**RUN, "weights": _weights(tmp_path / "w.safetensors", 1)}
    done = petune.run(**run, method="linear", output=tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    petune.compare(methods=("linear",), run=run, output=tmp_path / "table")
    sweep = {"run": {**run, "method": "linear"}, "search": {"train.lr": [0.1, 0.01]}, "output": tmp_path / "sweep"}
    petune.sweep(**sweep, trials=1, test=False)

    _weights(tmp_path / "w.safetensors", 2)
    changed = r"the weights file .*w\.safetensors has changed since"
    with pytest.raises(CheckpointError, match=changed):
        petune.run(**run, method="linear", output=tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match=changed):
        petune.compare(methods=("linear", "bitfit"), run=run, output=tmp_path / "table")
    with pytest.raises(CheckpointError, match=changed):
        petune.sweep(**sweep, trials=2, test=False)
    _weights(tmp_path / "w.safetensors", 1)
    assert petune.run(**run, method="linear", output=tmp_path / "run", resume=True).top1 == done.top1


@pytest.mark.exhaustive
def test_a_changed_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {**RUN, "weights": "none", "train": {**RUN["train"], "weight_decay": 0.0}}  # type: ignore[dict-item]
    petune.run(**run, output=tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    table = {"methods": ("adaptformer", "linear"), "run": run, "output": tmp_path / "table"}
    petune.compare(**table, seeds=(0,))

    monkeypatch.setattr(AdaptFormer, "recipe", petune.Recipe(lr=1e-4))
    with pytest.raises(CheckpointError, match=r"the recipe has changed .* lr was 0\.005 and is 0\.0001"):
        petune.run(**run, output=tmp_path / "run", resume=True)
    rows = {row.method: row for row in petune.compare(**table, seeds=(0, 1)).rows}
    assert rows["linear"].status == "done"
    assert "seeds 0 and 1 differ" in rows["adaptformer"].reason
    assert "rates of 0.005 and 0.0001" in rows["adaptformer"].reason


@pytest.mark.exhaustive
def test_changed_options_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults that changed with the method's package; a run or a comparison would mix the two."""
    run = {**RUN, "weights": "none"}
    petune.run(**run, output=tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    table = {"methods": ("adaptformer", "linear"), "run": run, "output": tmp_path / "table"}
    petune.compare(**table, seeds=(0,))

    class Newer(AdaptFormer.Config):  # type: ignore[misc,name-defined]
        dropout: float = 0.25
        another: int = 0

    monkeypatch.setattr(AdaptFormer, "Config", Newer)
    changed = r"options of adaptformer have changed .* dropout was 0\.1 and is 0\.25"
    with pytest.raises(CheckpointError, match=changed):
        petune.run(**run, output=tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match=changed):
        petune.compare(**table, seeds=(0, 1))
    assert petune.compare(**{**table, "methods": ("linear",)}, seeds=(0, 1)).rows[0].status == "done"


def test_a_name_fits_a_directory(tmp_path: Path) -> None:
    long = [directory_name("linear", "folder:" + "ä" * 300 + end, "seed0") for end in "ab"]
    assert len({*long}) == 2
    assert all(len(name.encode()) < 200 for name in long)
    assert directory_name("vpt:deep=false", "seed0") == "vpt_deep=false-seed0"


@pytest.mark.exhaustive
def test_peak_memory_includes_training(tmp_path: Path) -> None:
    """Also where another process only tests, as at the end of a sweep."""
    run = {**RUN, "weights": "none", "train": {**RUN["train"], "epochs": 1}}  # type: ignore[dict-item]
    ballast = [torch.ones(600_000_000, dtype=torch.uint8)]
    done = petune.run(**run, output=tmp_path / "run")
    ballast.clear()
    (tmp_path / "run" / "result.json").unlink()
    again = petune.run(**run, output=tmp_path / "run", resume=True)
    assert again.peak_memory_bytes > done.peak_memory_bytes - 100_000_000
