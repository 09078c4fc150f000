"""Weights: where they come from, and what a run records about them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import petune
from petune.backbones.create import create_backbone
from petune.backbones.weights import Weights, bundled_file, load_into, read_weights
from petune.base import hub
from petune.base.errors import CheckpointError, WeightsUnavailable
from petune.serving.restore import restore


def test_bundled_weights_are_recorded_by_digest_and_others_by_path(tmp_path: Path) -> None:
    file = bundled_file("cifar100")
    assert file is not None
    copy = shutil.copy(file, tmp_path / "mine.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]

    assert create_backbone("vit_nano", num_classes=2).weights == f"petune's vit_nano_cifar100 (sha256 {digest})"
    assert create_backbone("vit_nano", weights=str(copy), num_classes=2).weights == str(copy)


class Deep(nn.Module):
    """Layers and a classifier below the same prefix, as in transformers' models."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))
        self.model.classifier = nn.Linear(2, 2)


def test_unexpected_layers_are_named() -> None:
    head = {"model.classifier.weight", "model.classifier.bias"}
    load_into(Deep(2), Weights(Deep(2).state_dict(), {}, "file"), head)
    with pytest.raises(CheckpointError, match=r"2 unexpected: model\.layers\.1\.bias, model\.layers\.1\.weight"):
        load_into(Deep(1), Weights(Deep(2).state_dict(), {}, "file"), head)


def test_timm_supplies_statistics_that_a_file_lacks(tmp_path: Path) -> None:
    shape = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    saved = create_backbone("vit_tiny", weights="none", num_classes=2, image_size=32, options=shape).model
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    arguments = {"weights": str(tmp_path / "w.safetensors"), "num_classes": 2, "image_size": 32, "options": shape}
    timms = create_backbone("vit_tiny", **arguments)
    assert (timms.mean, timms.std) == ((0.5,) * 3, (0.5,) * 3)
    unknown = create_backbone(
        "vit_paddle_study", **(arguments | {"patch_size": 16, "options": shape | {"qkv_bias": True}})
    )
    assert (unknown.mean, unknown.std) == (None, None)


def test_a_run_notes_that_a_file_has_no_statistics(tmp_path: Path) -> None:
    shape = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    saved = create_backbone("vit_nano", weights="none", num_classes=10, image_size=8, options=shape).model
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    notes: list[str] = []
    petune.run(
        method="linear", backbone="vit_nano", weights=str(tmp_path / "w.safetensors"), dataset="digits", image_size=8,
        backbone_options=shape, shots=2, train={"epochs": 1, "batch_size": 10}, device="cpu",
        output=tmp_path / "run", watch=lambda event: notes.append(str(event)),
    )  # fmt: skip
    assert any("does not record mean and std" in note for note in notes)


def test_an_adapter_finds_its_weights_file_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    saved = create_backbone("vit_nano", weights="none", num_classes=10, image_size=8, options=shape).model
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    petune.run(
        method="linear", backbone="vit_nano", weights="./w.safetensors", dataset="digits", image_size=8,
        backbone_options=shape, shots=2, train={"epochs": 1, "batch_size": 10}, device="cpu",
        output=tmp_path / "run",
    )  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert restore(tmp_path / "run").attachment.attached
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(WeightsUnavailable, match=r"the weights that .* was trained on are not available"):
        restore(tmp_path / "run")


@pytest.mark.parametrize("content", [b"hello world\n", b"", b"<html>", b"\x80\x02."])
def test_an_invalid_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"t\.pt"):
        read_weights(tmp_path / "t.pt")


def test_invalid_metadata_is_reported(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors", metadata={"petune": "null"})
    with pytest.raises(CheckpointError, match=r"w\.safetensors is damaged"):
        read_weights(tmp_path / "w.safetensors")


def test_only_what_was_read_and_found_damaged_is_taken_out_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(1)}, file)
    assert hub.verify_safetensors(file, "the cached weights") == file

    def refused(self: Path, *args: object, **rest: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:  # root may read everything
        patched.setattr(Path, "open", refused)
        with pytest.raises(WeightsUnavailable, match=r"cannot read .*: Permission denied"):
            hub.verify_safetensors(file, "the cached weights")
    assert file.exists()
    file.write_bytes(b"damaged")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refused)
        with pytest.raises(WeightsUnavailable, match=r"cannot be deleted \(Permission denied\)"):
            hub.verify_safetensors(file, "the cached weights")
    with pytest.raises(WeightsUnavailable, match="It was deleted"):
        hub.verify_safetensors(file, "the cached weights")
    assert not file.exists()
