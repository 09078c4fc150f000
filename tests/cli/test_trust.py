"""Code that an adapter names is neither imported nor called unless it is trusted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.program import Run
from tests.trained import changed

FACTORY = """
import pathlib, timm
pathlib.Path("ran").touch()

def make(num_classes):
    return timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=48, depth=1, num_heads=4,
                             num_classes=num_classes)
"""
USES = {
    "predict": ("predict", "DIR", "zero.png"),
    "eval": ("eval", "DIR", "--output=out"),
    "export": ("export", "DIR", "out.pt2"),
    "demo": ("demo", "DIR"),
}


@pytest.fixture
def factory(petune: Run, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory that creates a file `ran`."""
    Path("models_of_mine.py").write_text(FACTORY)
    Image.new("RGB", (8, 8)).save("zero.png")
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("models_of_mine", None)
    return "models_of_mine:make"


@pytest.mark.parametrize("use", USES)
def test_a_function_named_by_an_adapter_is_not_called(
    use: str, petune: Run, digits: Path, factory: str, tmp_path: Path
) -> None:
    backbone = {"name": factory, "image_size": 8, "patch_size": None, "options": {}, "head": "linear"}
    adapter = changed(digits / "adapter", tmp_path / "from-elsewhere", backbone=backbone)
    done = petune(*(adapter if word == "DIR" else word for word in USES[use]))
    assert done.code == 4
    assert f"a backbone that is built by {factory}, code that would run here" in done.err
    assert "--trust-remote-code" in done.err
    assert not Path("ran").exists()
    assert "models_of_mine" not in sys.modules


@pytest.mark.exhaustive
def test_trusted_code_is_used(petune: Run, factory: str) -> None:
    words = ("--backbone", factory, "--weights=none", "--dataset=digits", "--shots=5", "--epochs=1")
    done = petune("run", "--method=linear", *words, "--device=cpu", "--precision=fp32", "--output=mine")
    assert done.code == 0, done.err
    assert petune("predict", "mine", "zero.png", "--trust-remote-code").code == 0
    assert petune("eval", "mine", "--trust-remote-code").code == 0
    assert petune("export", "mine", "out.pt2", "--trust-remote-code").code == 0
