"""Runs of several tasks on the same backbone, trained on a table of real digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import petune
from tests.data.tables import digit_class, write_images, write_table
from tests.serving.bank_adapters import Trained

BACKBONE: dict[str, Any] = {
    "backbone": "vit_nano", "device": "cpu", "image_size": 16,
}  # fmt: skip
TRAIN: dict[str, Any] = {"epochs": 1, "batch_size": 16, "precision": "fp32", "lr": 0.02}
TASKS = {"class": "label=digit", "labels": "labels=labels", "number": "target=digit", "numbers": "target=[digit,rest]"}
METHODS = {"class": "lora", "labels": "adaptformer:bottleneck=4", "number": "bitfit", "numbers": "vpt:num_prompts=2"}


def digit_rows(folder: Path, count: int) -> list[dict[str, Any]]:
    """Write images below a folder and return the rows of a table of them."""
    rows = []
    for i, name in enumerate(write_images(folder / "digits", count)):
        digit = digit_class(i)
        labels = ["even"] * (digit % 2 == 0) + ["prime"] * (digit in {2, 3, 5, 7}) + ["large"] * (digit > 4)
        rows.append({"file": f"digits/{name}", "digit": digit, "rest": 1000.5 + 3 * (digit % 3), "labels": labels})
    return rows


@pytest.fixture(scope="session")
def task_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the directories of finished runs by kind of target. Read them, do not write to them."""
    folder = tmp_path_factory.mktemp("tasks")
    table = write_table(folder / "digits.jsonl", digit_rows(folder, 80))
    for name, options in TASKS.items():
        dataset = f"table:{table},{options}"
        petune.run(**BACKBONE, dataset=dataset, method=METHODS[name], train=TRAIN, output=folder / name)
    return {name: folder / name for name in TASKS}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return adapters for tests of a bank. Read them, do not write to them."""
    return Trained(tmp_path_factory.mktemp("tasks"))
