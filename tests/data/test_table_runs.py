"""Runs on tables: train, evaluate on other rows, predict, and refuse to resume after a change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import petune
from petune.base.errors import DataError
from tests.data.tables import digit_class, write_images, write_table

RUN: dict[str, Any] = {
    "method": "linear", "backbone": "vit_nano", "weights": "none", "device": "cpu",
    "backbone_options": {"depth": 1, "embed_dim": 24}, "train": {"epochs": 1, "batch_size": 16, "precision": "fp32"},
}  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write a table of 40 digits of the classes 0 to 9."""
    names = write_images(tmp_path / "digits", 40)
    rows = [{"file": f"digits/{name}", "label": digit_class(i), "writer": i // 4} for i, name in enumerate(names)]
    return write_table(tmp_path / "digits.csv", rows)


def test_train_evaluate_and_predict(table: Path) -> None:
    result = petune.run(**RUN, dataset=f"{table}", output=table.parent / "run")
    own = petune.evaluate(table.parent / "run")
    assert own.top1 == pytest.approx(result.top1)
    copy = petune.evaluate(table.parent / "run", dataset=f"table:{table},label=label")
    assert (copy.split, copy.num_images) == ("test", own.num_images)
    rows = [{"photo": f"digits/{i}.png", "digit": digit_class(i)} for i in range(7)]
    other = write_table(table.parent / "other.jsonl", rows)
    theirs = petune.evaluate(table.parent / "run", dataset=f"table:{other},label=digit")
    assert (theirs.split, theirs.num_images) == ("all", 7)
    paths_only = write_table(table.parent / "paths.csv", [{"photo": row["photo"]} for row in rows])
    for source in (paths_only, f"table:{other},image=photo"):
        predictions = petune.predict(table.parent / "run", [source])
        assert [prediction.image for prediction in predictions] == [str(table.parent / row["photo"]) for row in rows]


def test_a_changed_table_is_not_resumed(table: Path) -> None:
    output = table.parent / "run"
    petune.run(**RUN, dataset=f"table:{table},group=writer", output=output)
    (output / "result.json").unlink()
    table.write_text(table.read_text().replace("digits/3.png,3", "digits/3.png,4"))
    with pytest.raises(DataError, match=r"have changed since .*train/3 had"):
        petune.run(**RUN, dataset=f"table:{table},group=writer", output=output, resume=True)
