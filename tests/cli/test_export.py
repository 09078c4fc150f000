"""`petune export`: the plain model gives the same scores, loads with timm, and what cannot be folded is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from petune.restore import restore

Run = Callable[..., Any]
Words = tuple[str, ...]
SHAPE = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_classes": 10}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.mark.parametrize("method", ["lora:r=2", "dora:r=2", "bitfit", "norm", "ssf", "repadapter"])
def test_the_plain_model_gives_the_same_scores(petune: Run, tiny: Words, tmp_path: Path, method: str) -> None:
    done = petune("run", "--method", method, *tiny, "--output", "here")
    assert done.code == 0, done.err
    out = petune("export", "here", "--merged", "plain.safetensors", "--json")
    assert out.code == 0, out.err
    file = tmp_path / "plain.safetensors"
    assert json.loads(out.out) == {"output": "plain.safetensors", "bytes": file.stat().st_size}
    plain = timm.create_model("vit_tiny_patch16_224", **SHAPE, num_heads=3).eval()
    plain.load_state_dict(load_file(file))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tuned = restore(tmp_path / "here").attachment.model.eval()(x)
        torch.testing.assert_close(plain(x), tuned, atol=1e-5, rtol=1e-5)
    with safe_open(file, "pt") as opened:
        info = json.loads(opened.metadata()["petune"])
    assert info["classes"] == [str(n) for n in range(10)]
    again = petune("run", "--method", "linear", *tiny, "--weights", "plain.safetensors", "--dry-run")
    assert again.code == 0, again.err


def test_what_does_not_fold_is_refused(petune: Run, tiny: Words, tmp_path: Path) -> None:
    assert petune("run", "--method", "adaptformer", *tiny, "--output", "here").code == 0
    done = petune("export", "here/adapter", "--merged", "plain.safetensors")
    assert (done.code, done.out) == (1, "")
    assert "ReLU" in done.err
    assert not (tmp_path / "plain.safetensors").exists()
    other = petune("export", "here", "--merged", "out.bin")
    assert (other.code, "new .safetensors file" in other.err) == (2, True)
    (tmp_path / "old.safetensors").write_bytes(b"")
    assert petune("export", "here", "--merged", "old.safetensors").code == 2
    none = petune("export", "nowhere", "--merged", "plain.safetensors")
    assert (none.code, "adapter directory" in none.err) == (4, True)


def test_an_adapter_that_does_not_know_its_backbone(petune: Run, tmp_path: Path) -> None:
    from petune import attach
    from petune.tiny_models import tiny_timm

    attach(tiny_timm(), "bitfit").save(tmp_path / "a")
    done = petune("export", "a", "--merged", "plain.safetensors")
    assert done.code == 4
    assert "must say which backbone" in done.err
