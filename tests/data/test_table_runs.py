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


def test_evaluate_on_images_inside_another_table(table: Path) -> None:
    petune.run(**RUN, dataset=f"{table}", output=table.parent / "run")
    rows = [
        {"image": (table.parent / f"digits/{i}.png").read_bytes(), "label": str(digit_class(i))} for i in range(5, 12)
    ]
    embedded = write_table(table.parent / "embedded.parquet", rows)
    paths = [{"image": f"digits/{i}.png", "label": digit_class(i)} for i in range(5, 12)]
    files = write_table(table.parent / "files.csv", paths)
    inside, outside = (petune.evaluate(table.parent / "run", dataset=str(path)) for path in (embedded, files))
    assert (inside.split, inside.num_images) == ("all", 7)
    assert inside.metrics == pytest.approx(outside.metrics, nan_ok=True)


@pytest.mark.parametrize(("options", "metric"), [("labels=tags,separator=|", "map"), ("target=count", "mae")])
def test_other_targets(options: str, metric: str, tmp_path: Path) -> None:
    names = write_images(tmp_path, 40)
    values = [f"{'even' if digit_class(i) % 2 == 0 else 'odd'}|{'big' if i % 3 else 'small'}" for i in range(40)]
    rows = [{"file": n, "tags": values[i], "count": digit_class(i) / 2} for i, n in enumerate(names)]
    path = write_table(tmp_path / "t.csv", rows)
    result = petune.run(**RUN, dataset=f"table:{path},{options}", output=tmp_path / "run")
    assert metric in {name.casefold() for name in result.metrics}
    other = write_table(tmp_path / "other.csv", rows[:6])
    assert petune.evaluate(tmp_path / "run", dataset=f"table:{other},{options}").num_images == 6
