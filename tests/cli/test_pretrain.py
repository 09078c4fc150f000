"""`petune pretrain`, and its result as --weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Run = Callable[..., Any]
Words = tuple[str, ...]


def test_the_result_is_weights_for_run(petune: Run, tiny: Words, tmp_path: Path) -> None:
    done = petune("pretrain", *tiny, "--json", "--track", "tensorboard")
    assert done.code == 0, done.err
    place = json.loads(done.out)["output"]
    assert place == "runs/pretrain-vit_nano-digits-seed0"
    assert done.err.endswith(f"use it with: --backbone vit_nano --weights {place}\n")
    assert {"backbone.safetensors", "tensorboard"} <= {p.name for p in (tmp_path / place).iterdir()}
    tuned = petune("run", "--method", "linear", *tiny, "--weights", place, "--json")
    assert tuned.code == 0, tuned.err
    assert json.loads(tuned.out)["weights"] == f"{place}/backbone.safetensors"


def test_its_defaults_hold_beside_flags(petune: Run) -> None:
    done = petune("pretrain", "--lr", "1e-3", "--dry-run")
    train = yaml.safe_load(done.out)["train"]
    assert (train["lr"], train["epochs"], train["label_smoothing"]) == (0.001, 30, 0.1)
    assert "recipe              nmuon, learning rate 0.002, weight decay 0.05\n" in done.err


def test_it_has_no_method(petune: Run) -> None:
    assert petune("pretrain", "--method", "vpt").code == 2
