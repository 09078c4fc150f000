"""`petune compare`: one table, rows that failed, a configuration from flags or a file."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from petune.base.errors import Diverged

Run = Callable[..., Any]
Words = tuple[str, ...]


def test_one_table_and_finished_runs_are_skipped(petune: Run, tiny: Words, tmp_path: Path) -> None:
    done = petune("compare", "linear", "full", *tiny)
    assert done.code == 0, done.err
    heading, _, linear, full = done.out.strip().splitlines()
    assert heading.split("|")[1:4] == [" method ", "  tuned ", " head "]
    assert linear.startswith("| linear |      0 |  490 |")
    assert full.startswith("| full   | 62,160 |  490 |")
    assert "output: runs/compare-vit_nano-digits\n" in done.err
    again = petune("compare", "linear", "full", *tiny, "--json")
    assert again.code == 0
    assert "[2/2] full, seed 0: finished before\n" in again.err
    found = json.loads(again.out)
    assert [row["method"] for row in found["rows"]] == ["linear", "full"]
    assert found == json.loads((tmp_path / "runs" / "compare-vit_nano-digits" / "compare.json").read_text())


def test_a_method_that_fails_is_a_row_with_its_reason(
    petune: Run, tiny: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    from petune.runner.run import run as original

    def failing(config: Any, **rest: Any) -> Any:
        if config.method == "full":
            raise Diverged("loss is nan")
        return original(config, **rest)

    monkeypatch.setattr(sys.modules["petune.runner.executors.executor"], "run", failing)
    done = petune("compare", "linear", "full", *tiny)
    assert done.code == 1
    *_, row, reason = done.out.strip().splitlines()
    assert row.startswith("| full ")
    assert row.endswith("failed |")
    assert reason == "full failed: Diverged: loss is nan"


def test_what_goes_wrong_with_one_method_leaves_the_others_their_rows(
    petune: Run, tiny: Words, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from petune.tuners.bitfit import BitFit

    def wrong(*args: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(BitFit, "attach", wrong)
    words = ("--set=train.augment=none", "--set=train.cache_features=always")
    done = petune("compare", "full", "bitfit", "linear", *tiny, *words)
    assert done.code == 1
    assert "linear | " in done.out.replace("  ", " ").replace("  ", " ")
    said = " ".join(done.out.split())
    assert "full failed: ConfigError: cache_features=always" in said, said
    assert "bitfit failed: RuntimeError: no such kernel (traceback: " in said
    kept = next(tmp_path.rglob("bitfit-*.traceback.txt"))
    assert "and more" in kept.read_text()
    assert (kept.parent / "compare.json").exists()


def test_a_seed_is_missing_by_name(petune: Run, tiny: Words, tmp_path: Path) -> None:
    from petune.runner.report.tables import markdown

    assert petune("compare", "linear", "bitfit", *tiny, "--output", "there").code == 0
    table = json.loads((tmp_path / "there" / "compare.json").read_text())
    table["config"]["seeds"] = [0, 1]
    table["rows"][0]["seeds"] = [0, 1]
    assert "With fewer seeds: bitfit (seed 0)." in markdown(table)


def test_what_failed_before_anything_trained_may_be_corrected(petune: Run, tiny: Words, tmp_path: Path) -> None:
    words = ("compare", "linear", *tiny, "--output", "there")
    none = petune(*words, "--weights", "typo.safetensors")
    assert none.code == 4
    assert "typo.safetensors" in none.err
    assert not (tmp_path / "there").exists()
    assert petune(*words, "--dataset", "folder:typo").code == 1
    assert (tmp_path / "there" / "compare.json").exists()
    assert petune(*words).code == 0
    assert petune(*words, "--val-fraction", "0.2").code == 2  # now something has


def test_a_rate_that_a_run_did_not_have_is_refused_before_anything_trains(
    petune: Run, tiny: Words, tmp_path: Path
) -> None:
    assert petune("compare", "linear", *tiny, "--output", "there").code == 0
    kept = (tmp_path / "there" / "compare.yaml").read_text()
    done = petune("compare", "bitfit", "linear", *tiny, "--output", "there", "--set", "lrs.linear=0.02")
    assert done.code == 2
    assert "there/linear-vit_nano-digits-seed0 holds a run with another configuration" in done.err
    assert "train.lr: None before, 0.02 now" in done.err
    assert not list((tmp_path / "there").glob("bitfit*"))
    assert (tmp_path / "there" / "compare.yaml").read_text() == kept
    assert petune("compare", "--config", "there/compare.yaml", "--output", "there").code == 0


def test_seeds_that_are_not_asked_for_again_are_named_and_tables_from_elsewhere_kept(
    petune: Run, tiny: Words, tmp_path: Path
) -> None:
    assert petune("compare", "linear", *tiny, "--output", "there", "--seeds", "0,1").code == 0
    done = petune("compare", "linear", *tiny, "--output", "there")
    assert "the table will lack linear (seed 1), not asked for now; finished runs stay in there\n" in done.err
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "compare.md").write_text("mine")
    done = petune("compare", "linear", *tiny, "--output", "kept")
    assert done.code == 2
    assert "kept/compare.md was not made by a comparison there, and is kept; name another --output" in done.err
    assert (tmp_path / "kept" / "compare.md").read_text() == "mine"


def test_a_directory_that_was_moved_or_copied_is_gone_on_in_where_it_lies(
    petune: Run, tiny: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert petune("compare", "linear", *tiny, "--output", "first").code == 0
    (tmp_path / "first").rename(tmp_path / "moved")
    again = petune("compare", "--config", "moved/compare.yaml")
    assert "[1/1] linear, seed 0: finished before\n" in again.err
    assert "output: moved\n" in again.err
    assert not (tmp_path / "first").exists()
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "linear-vit_nano-digits-seed0")
    monkeypatch.chdir(tmp_path / "copy")
    inside = petune("compare", "--config", "compare.yaml", "--json")  # as its first line says
    assert "finished before" not in inside.err
    assert (tmp_path / "copy" / "linear-vit_nano-digits-seed0" / "result.json").is_file()
    assert petune("compare", "--config", "compare.yaml", "--output", "../new", "--dry-run").code == 0


def test_what_belongs_to_runs_goes_there(petune: Run, tiny: Words, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("val_fraction: 0.2\ntrain: {batch_size: 32}\n")
    words = ("--config", "run.yaml", "--set", "train.grad_clip=5", "--set", "seeds=[4]", "--output", "there")
    done = petune("compare", "linear", *tiny, *words, "--dry-run")
    assert done.code == 0, done.err
    shown = yaml.safe_load(done.out)
    assert (shown["methods"], shown["seeds"], shown["output"]) == (["linear"], [4], "there")
    run = shown["run"]
    assert (run["val_fraction"], run["train"]["batch_size"], run["train"]["grad_clip"]) == (0.2, 32, 5.0)
    assert run["output"] is None
    (tmp_path / "compare.yaml").write_text(done.out)
    assert petune("compare", "--config", "compare.yaml", "--dry-run").out == done.out


def test_no_method_and_twice_the_same_are_refused(petune: Run, tiny: Words) -> None:
    none = petune("compare", *tiny)
    assert none.code == 2
    assert "methods: required" in none.err
    twice = petune("compare", "linear", "linear", *tiny)
    assert twice.code == 2
    assert "each may stand once, but linear stands twice" in twice.err


def test_a_method_may_have_a_rate_of_its_own(petune: Run, tiny: Words, tmp_path: Path) -> None:
    words = ("compare", "linear", "full", *tiny, "--lr=0.02", "--set=lrs.full=0.001")
    assert petune(*words).code == 0
    rates = {
        method: yaml.safe_load((place / "config.yaml").read_text())["train"]["lr"]
        for method in ("linear", "full")
        for place in (tmp_path / "runs" / "compare-vit_nano-digits").glob(f"{method}-*")
    }
    assert rates == {"linear": 0.02, "full": 0.001}
    done = petune("compare", "vpt:deep=false", "lora:lora_dropout=0.1", *tiny, "--set=lrs.vpt:deep=false=1e-3",
                  "--set=lrs.lora:lora_dropout=0.1=0.5", "--dry-run")  # fmt: skip
    assert yaml.safe_load(done.out)["lrs"] == {"vpt:deep=false": 0.001, "lora:lora_dropout=0.1": 0.5}, done.err
    (tmp_path / "a.yaml").write_text("lrs: 3\n")
    for words in (("--set=lrs.linear",), ("--config=a.yaml", "--set=lrs.linear=1")):
        assert petune("compare", "linear", *tiny, *words).err.startswith("error: ")
    wrong = petune("compare", "linear", *tiny, "--set=lrs.linar=0.1")
    assert wrong.code == 2
    assert "linar is not a method of this comparison. Did you mean linear?" in wrong.err
