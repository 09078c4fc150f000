"""`petune inspect`: sites and counts, without weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

SMALL = ("--backbone", "vit_nano", "--set", "backbone_options.depth=1", "--dataset", "digits")
SITES = """\
VisionTransformer: 1 block, width 192, grid 8x8, 1 prefix token, input 3x32x32
site         where                    layout  dim
patch_embed  patch_embed              BNC     192
block 0      blocks.0                 BNC     192
  attn       blocks.0.attn            BNC     192
  mlp        blocks.0.mlp             BNC     192
  norm1      blocks.0.norm1           BNC     192
  norm2      blocks.0.norm2           BNC     192
  mid        input of blocks.0.norm2  BNC     192
norm         norm                     BNC     192
head         head                     BNC     192
"""
PLAN = """
method              linear
tuned               0  (with the head 0.411 % of all parameters, 0.411 % of backbone and head)
head                1,930
all parameters      469,258
forward             61.936 MFLOPs per image
without the method  61.936 MFLOPs (the method adds 0.00 %)
"""


def test_sites_are_printed_as_a_table(petune: Run) -> None:
    done = petune("inspect", *SMALL)
    assert (done.code, done.out) == (0, SITES)
    assert done.err == (
        "vit_tiny_patch16_224,depth=1,img_size=32,patch_size=4: structure only, weights were not loaded\n"
    )


def test_with_a_method_its_counts_follow(petune: Run, tmp_path: Path) -> None:
    done = petune("inspect", "--method", "linear", *SMALL)
    assert done.code == 0, done.err
    assert done.out.startswith(SITES + PLAN)
    assert list(tmp_path.iterdir()) == []


def test_json_has_sites_and_counts(petune: Run) -> None:
    found = json.loads(petune("inspect", "--method", "full", *SMALL, "--json").out)
    assert found["weights_loaded"] is False
    assert found["sites"]["grid_size"] == [8, 8]
    assert found["sites"]["blocks"][0]["mid"] == {
        "where": "input of blocks.0.norm2",
        "layout": "BNC",
        "dim": 192,
    }
    assert (found["method"]["tuned"], found["method"]["percent_of_backbone"]) == (467_328, 100.0)
    assert json.loads(petune("inspect", *SMALL, "--json").out)["method"] is None


@pytest.mark.exhaustive
def test_a_large_backbone_needs_no_network_and_no_memory(petune: Run) -> None:
    done = petune("inspect", "--method", "full", "--backbone", "vit_large", "--dataset", "cifar100", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["method"]["total"] == 303_404_132


@pytest.mark.parametrize("words", [("--epochs", "3"), ("--lr", "1")])
def test_training_flags_are_refused(words: tuple[str, str], petune: Run) -> None:
    assert petune("inspect", *words).code == 2


SWIN = ("--set", "backbone_options.embed_dim=24", "--set", "backbone_options.depths=[2,2]",
        "--set", "backbone_options.num_heads=[2,4]", "--set", "backbone_options.window_size=4")  # fmt: skip


def test_prompts_on_a_windowed_model(petune: Run) -> None:
    swin = ("--backbone=swin_tiny_patch4_window7_224", "--image-size=32", "--dataset=digits", *SWIN)
    done = petune("inspect", "--method", "vpt", *swin)
    assert done.code == 0, done.err
    assert f"tuned               {10 * (2 * 24 + 2 * 48):,}  (" in done.out


@pytest.mark.exhaustive
def test_a_method_that_cannot_be_attached_is_refused(petune: Run) -> None:
    done = petune("inspect", "--method", "vpt", "--backbone=torchvision:swin_t", "--dataset=digits")
    assert done.code == 1
    assert "features.1.0 of SwinTransformer cannot take prompts" in done.err
