"""An image size that makes many tokens gets a warning with the costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import petune
from petune.runner.preview import preview_backbone
from petune.runner.run_config import RunConfig
from petune.training.events import Event, Note
from tests.sampling import sampled


@pytest.mark.parametrize(
    ("backbone", "sizes", "words"),
    sampled(
        [
            (
                "vit_nano",
                {"image_size": 224},
                ("3,136 tokens", "made for 64", "instead of 0.37 GFLOPs", "patch_size=28"),
            ),
            ("vit_nano", {"image_size": 224, "patch_size": 28}, ()),
            ("vit_nano", {"image_size": 64}, ()),
            ("vit_nano", {}, ()),
            ("vit_tiny", {"image_size": 384}, ()),
            ("vit_tiny", {"image_size": 32}, ()),
            ("vit_tiny", {"image_size": 32, "patch_size": 4}, ()),
        ],
        lambda row: row[0] == "vit_nano" and row[1] in ({"image_size": 224}, {"image_size": 64}),
    ),
)
def test_many_more_tokens_give_a_warning(backbone: str, sizes: dict[str, int], words: tuple[str, ...]) -> None:
    warning = preview_backbone(RunConfig(backbone=backbone, dataset="digits", **sizes)).warning
    assert bool(warning) == bool(words)
    assert [word for word in words if word not in warning] == []


def test_a_run_shows_the_warning_before_it_trains(tmp_path: Path) -> None:
    notes: list[str] = []

    def watch(event: Event) -> None:
        notes.extend([event.text] if isinstance(event, Note) else [])

    shape: dict[str, Any] = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    petune.run(
        method="linear", backbone="vit_nano", weights="none", dataset="digits", shots=2, image_size=96, device="cpu",
        backbone_options=shape, train={"epochs": 1, "batch_size": 10}, output=tmp_path / "run", watch=watch,
    )  # fmt: skip
    assert sum("576 tokens" in note for note in notes) == 1
