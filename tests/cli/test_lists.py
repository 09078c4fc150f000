"""`petune methods`, `backbones`, `datasets`, `env`: whole outputs, and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petune.base.plugins import PluginRecord
from petune.cli.terminal import print_table

Run = Callable[..., Any]

DATASETS = [
    ["name", "about", "needs", "found"],
    ["cifar10", "60,000 images of 10 classes, 32x32", "a download of 163 MB, or its files in data_dir", "-"],
    ["cifar100", "60,000 images of 100 classes, 32x32", "a download of 161 MB, or its files in data_dir", "-"],
    ["digits", "scikit-learn's 1,797 handwritten digits, 8x8, no download", "-", "scikit-learn"],
    ["folder:PATH", "your images: PATH/CLASS/*.jpg, or PATH/train/CLASS/*.jpg with test/ and val/", "-", "-"],
    [
        "hf:NAME",
        "a dataset of the Hugging Face Hub, or a folder of Parquet files or of save_to_disk",
        "petune[data], and a download if NAME is no folder",
        "-",
    ],
    [
        "medmnist:NAME",
        "12 sets of medical images, 28 to 224 pixels; `petune datasets medmnist` lists them",
        "petune[data], and a file in data_dir or a download",
        "-",
    ],
    [
        "table:FILE",
        "a CSV, TSV, Parquet or JSON lines file: images or videos, and classes, labels, numbers or masks",
        "-",
        "-",
    ],
    [
        "torchvision:NAME",
        "39 labeled datasets of torchvision; `petune datasets torchvision` lists them",
        "its files in data_dir, or a download",
        "-",
    ],
    [
        "vtab:NAME",
        "1,000 training images in VTAB-1k's layout: train800.txt, val200.txt, test.txt",
        "DATA_DIR/NAME, DATA_DIR/vtab-1k/NAME or a path",
        "-",
    ],
    [
        "wds:SHARDS",
        "tar shards of webdataset: a folder, or a pattern such as train-{000..012}.tar",
        "petune[data]",
        "-",
    ],
]
BUILT_IN = ["adaptformer", "full", "linear", "vpt"]


def test_methods_list_the_built_in_ones(petune: Run) -> None:
    rows = {row["name"]: row for row in json.loads(petune("methods", "--json").out)}
    assert set(BUILT_IN) <= set(rows)
    assert {rows[name]["distribution"] for name in BUILT_IN} == {"petune"}
    assert {rows[name]["state"] for name in BUILT_IN} == {"ok"}


def test_methods_show_broken_ones_without_control_characters(petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        PluginRecord("good", "petune", "1.0", "nowhere:Good", "ok", "A good one"),
        PluginRecord("bad\x1b[2J", "?", "?", "nowhere:Bad", "broken: no\nsuch module"),
    ]
    monkeypatch.setattr("petune.injector.registry.list_tuners", lambda: records)
    done = petune("methods")
    assert done.code == 0
    assert done.out == (
        "| method | what it does | trains | paper | package    | state                  |\n"
        "|--------|--------------|--------|-------|------------|------------------------|\n"
        "| good   | A good one   | -      | -     | petune 1.0 | ok                     |\n"
        "| bad[2J | -            | -      | -     | ? ?        | broken: no such module |\n"
    )


def test_methods_say_what_they_do(petune: Run) -> None:
    rows = {row["name"]: row for row in json.loads(petune("methods", "--json").out)}
    assert rows["adaptformer"]["arxiv"] == "2205.13535"
    assert "MLP" in rows["adaptformer"]["summary"]
    table = petune("methods").out
    assert "arXiv:2205.13535" in table
    assert "state" not in table.splitlines()[0]  # only shown if one is broken


def test_backbones(petune: Run) -> None:
    done = petune("backbones")
    assert done.code == 0
    names = [line.split("|")[1].strip() for line in done.out.strip().splitlines()]
    assert names == [
        "name",
        "-" * 18,
        "vit_nano",
        "vit_tiny",
        "vit_small",
        "vit_base",
        "vit_large",
        "vit_paddle_study",
    ]
    assert json.loads(petune("backbones", "--json").out)[0]["timm_name"] == "vit_tiny_patch16_224"


def test_backbones_of_timm(petune: Run) -> None:
    done = petune("backbones", "vit_tiny_patch16_224*")
    assert done.code == 0
    assert "vit_tiny_patch16_224.augreg_in21k" in done.out.splitlines()
    assert json.loads(petune("backbones", "vit_tiny_patch16_224", "--json").out) == done.out.splitlines()
    none = petune("backbones", "nothing_like_it")
    assert (none.code, none.out) == (0, "")
    assert "nothing_like_it" in none.err
    assert petune("backbones", "vit_nano").out.splitlines()[0] == "vit_nano"
    assert petune("backbones", "vit_tin*").out.splitlines()[:2] == ["vit_tiny", "vit_tiny_patch16_224.augreg_in21k"]


def test_help_says_each_default_once_and_arguments_in_capitals(petune: Run) -> None:
    assert "Usage: petune backbones [OPTIONS] [PATTERN]\n" in petune("backbones", "-h").out
    assert petune("plugin", "new", "-h").out.count("default") == 2  # of --kind and of --output


def test_on_a_narrow_terminal_no_word_is_broken(petune: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    done = petune("backbones")
    assert {"vit_nano", "vit_large", "ImageNet-21k", "(AugReg),"} <= set(done.out.split())
    assert done.err.startswith("hidden (terminal too narrow): timm model, default weights\n")


def test_a_piped_table_has_every_column_and_one_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [f"column {number}" for number in range(30)]
    rows = [["x" * 500, *["two\nlines 漢字"] * 29], ["y"] * 30]
    print_table(columns, rows, optional=columns[1:])
    shown, note = capsys.readouterr()
    assert note == ""
    assert _cells(shown) == [columns, ["x" * 500, *["two lines 漢字"] * 29], ["y"] * 30]


def test_piped_methods_say_what_each_trains(petune: Run) -> None:
    done = petune("methods")
    heading, *rows = _cells(done.out)
    assert done.err == ""
    assert heading == ["method", "what it does", "trains", "paper", "package"]
    assert {len(row) for row in rows} == {len(heading)}
    assert len(rows) == len(json.loads(petune("methods", "--json").out))


def test_datasets(petune: Run) -> None:
    done = petune("datasets")
    assert (done.code, done.err) == (0, "")
    rows = _cells(done.out)
    own = {row[0] for row in DATASETS}
    assert [row[:4] for row in rows if row[0] in own] == DATASETS  # the package follows if plugins are installed


def test_datasets_that_are_here(petune: Run, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    rows = json.loads(petune("datasets", "--data-dir", tmp_path, "--json").out)
    assert {row["name"]: row["found"] for row in rows if row["found"]} == {
        "cifar10": str(tmp_path / "cifar-10-batches-py"),
        "digits": "scikit-learn",
    }


def test_env(petune: Run, tmp_path: Path) -> None:
    rows = json.loads(petune("env", "--json").out)
    assert set(rows) == {
        "versions", "python", "platform", "git", "device", "threads", "precision", "cache_dir", "data_dir",
        "hub_cache_dir", "datasets",
    }  # fmt: skip
    assert rows["versions"]["numpy"] == np.__version__
    assert (rows["cache_dir"], rows["data_dir"]) == (str(tmp_path / "cache"), None)
    assert rows["precision"] in {"fp32", "bf16"}
    shown = dict(line.split(maxsplit=1) for line in petune("env").out.splitlines())
    assert shown["numpy"] == np.__version__
    assert shown["precision"] in {"fp32", "bf16"}


def _cells(table: str) -> list[list[str]]:
    """The rows of a table, without the line under its heading."""
    heading, _, *rows = table.splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in (heading, *rows)]
