"""Where weights come from, as a run's record says it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from petune.backbones import create_backbone
from petune.weights import bundled


def test_bundled_weights_are_named_by_what_they_hold_and_others_by_their_path(tmp_path: Path) -> None:
    file = bundled("cifar100")
    assert file is not None
    copy = shutil.copy(file, tmp_path / "mine.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]

    assert create_backbone("vit_nano", num_classes=2).weights == f"petune's vit_nano_cifar100 (sha256 {digest})"
    assert create_backbone("vit_nano", weights=str(copy), num_classes=2).weights == str(copy)
