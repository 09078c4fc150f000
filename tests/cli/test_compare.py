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
    heading, _, *rows = done.out.strip().splitlines()
    columns = [name.strip() for name in heading.split("|")[1:-1]]
    assert columns[:3] == ["method", "top-1", "difference"]
    table = [dict(zip(columns, (cell.strip() for cell in row.split("|")[1:-1]), strict=True)) for row in rows]
    assert {row["method"]: (row["tuned"], row["head"]) for row in table} == {
        "linear": ("0", "490"),
        "full": ("62,160", "490"),
    }
    accuracies = [float(row["top-1"]) for row in table]
    assert accuracies == sorted(accuracies, reverse=True)
    assert "output: runs/compare-vit_nano-digits\n" in done.err
    again = petune("compare", "linear", "full", *tiny, "--json")
    assert again.code == 0
    assert "[2/2] full, seed 0: finished before\n" in again.err
    result = json.loads(again.out)
    assert [row["method"] for row in result["rows"]] == ["linear", "full"]
    assert result == json.loads((tmp_path / "runs" / "compare-vit_nano-digits" / "compare.json").read_text())


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
def test_a_method_that_fails_does_not_stop_the_others(
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


@pytest.mark.exhaustive
def test_a_missing_seed_is_named(petune: Run, tiny: Words, tmp_path: Path) -> None:
    from petune.runner.report.tables import comparison_page

    assert petune("compare", "linear", "bitfit", *tiny, "--output", "there").code == 0
    table = json.loads((tmp_path / "there" / "compare.json").read_text())
    table["config"]["seeds"] = [0, 1]
    table["rows"][0]["seeds"] = [0, 1]
    assert "With fewer seeds: bitfit (seed 0)." in comparison_page(table)


def test_different_number_formats_are_named_on_the_terminal(petune: Run, tiny: Words, tmp_path: Path) -> None:
    assert petune("compare", "linear", "bitfit", *tiny, "--output=there").code == 0
    file = tmp_path / "there" / "bitfit-vit_nano-digits-seed0" / "result.json"
    result = json.loads(file.read_text())
    result["provenance"]["precision"] = "bf16"
    file.write_text(json.dumps(result))
    again = petune("compare", "linear", "bitfit", *tiny, "--output=there")
    assert "fp32: linear (seed 0); bf16: bitfit (seed 0)" in again.err


@pytest.mark.exhaustive
def test_before_training_the_configuration_can_be_corrected(petune: Run, tiny: Words, tmp_path: Path) -> None:
    words = ("compare", "linear", *tiny, "--output", "there")
    none = petune(*words, "--weights", "typo.safetensors")
    assert none.code == 4
    assert "typo.safetensors" in none.err
    typo = petune(*words, "--dataset", "folder:typo")
    assert (typo.code, typo.err) == (4, "error: no such folder: typo\n")
    assert not (tmp_path / "there").exists()
    assert petune(*words).code == 0
    assert petune(*words, "--val-fraction", "0.2").code == 2  # now something has


@pytest.mark.exhaustive
def test_another_learning_rate_for_a_finished_run_is_refused_before_training(
    petune: Run, tiny: Words, tmp_path: Path
) -> None:
    assert petune("compare", "linear", *tiny, "--output", "there").code == 0
    stored = (tmp_path / "there" / "config.yaml").read_text()
    done = petune("compare", "bitfit", "linear", *tiny, "--output", "there", "--set", "lrs.linear=0.02")
    assert done.code == 2
    assert "there/linear-vit_nano-digits-seed0 was started with a different configuration" in done.err
    assert "train.lr: None before, 0.02 now" in done.err
    assert not list((tmp_path / "there").glob("bitfit*"))
    assert (tmp_path / "there" / "config.yaml").read_text() == stored
    assert petune("compare", "--config", "there/config.yaml", "--output", "there").code == 0


@pytest.mark.exhaustive
def test_omitted_seeds_are_named_and_tables_from_elsewhere_kept(petune: Run, tiny: Words, tmp_path: Path) -> None:
    assert petune("compare", "linear", *tiny, "--output", "there", "--seeds", "0,1").code == 0
    done = petune("compare", "linear", *tiny, "--output", "there")
    assert "not in the table this time: linear (seed 1)" in done.err
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "compare.md").write_text("mine")
    done = petune("compare", "linear", *tiny, "--output", "kept")
    assert done.code == 2
    assert "kept/compare.md exists and was not written by a comparison" in done.err
    assert (tmp_path / "kept" / "compare.md").read_text() == "mine"


@pytest.mark.exhaustive
def test_a_moved_or_copied_directory_is_resumed_where_it_is(
    petune: Run, tiny: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert petune("compare", "linear", *tiny, "--output", "first").code == 0
    (tmp_path / "first").rename(tmp_path / "moved")
    again = petune("compare", "--config", "moved/config.yaml")
    assert "[1/1] linear, seed 0: finished before\n" in again.err
    assert "output: moved\n" in again.err
    assert not (tmp_path / "first").exists()
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "linear-vit_nano-digits-seed0")
    monkeypatch.chdir(tmp_path / "copy")
    inside = petune("compare", "--config", "config.yaml", "--json")  # as its first line says
    assert "finished before" not in inside.err
    assert (tmp_path / "copy" / "linear-vit_nano-digits-seed0" / "result.json").is_file()
    assert petune("compare", "--config", "config.yaml", "--output", "../new", "--dry-run").code == 0


@pytest.mark.exhaustive
def test_config_yaml_is_the_comparison_and_a_runs_config_a_start_for_one(
    petune: Run, tiny: Words, tmp_path: Path
) -> None:
    assert petune("compare", "linear", *tiny, "--output", "there").code == 0
    own = yaml.safe_load((tmp_path / "there" / "config.yaml").read_text())
    assert (own["methods"], own["seeds"], own["run"]["dataset"]) == (["linear"], [0], "digits")
    done = petune("run", "--config", "there/config.yaml", "--dry-run")
    assert done.code == 2
    assert "methods" in done.err
    of_run = "there/linear-vit_nano-digits-seed0/config.yaml"
    done = petune("compare", "bitfit", "--config", of_run, "--set", "method=null", "--dry-run")
    assert done.code == 2  # a comparison sets the method itself
    done = petune("compare", "bitfit", "--config", of_run, "--dry-run")
    assert done.code == 0, done.err
    assert yaml.safe_load(done.out)["output"] is None


def test_keys_of_a_run_go_to_the_section_run(petune: Run, tiny: Words, tmp_path: Path) -> None:
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


def test_the_seed_of_a_file_is_that_of_the_comparison(petune: Run, tiny: Words, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 3\n")
    words = ("compare", "linear", *tiny, "--config", "run.yaml", "--dry-run")
    for more, seeds in (((), [3]), (("--seed=4",), [4]), (("--seeds=0,1",), [0, 1]), (("--set=seeds=[5]",), [5])):
        assert yaml.safe_load(petune(*words, *more).out)["seeds"] == seeds


def test_a_file_with_seeds_and_another_seed_is_refused(petune: Run, tiny: Words, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seeds: [0, 1]\nseed: 3\n")
    done = petune("compare", "linear", *tiny, "--config", "a.yaml")
    assert "seed is 3, and a comparison runs its seeds: 0, 1" in done.err


def test_no_method_and_a_method_given_twice_are_refused(petune: Run, tiny: Words) -> None:
    none = petune("compare", *tiny)
    assert none.code == 2
    assert "for example:\n  petune compare linear adaptformer" in none.err
    twice = petune("compare", "linear", "linear", *tiny)
    assert twice.code == 2
    assert "methods: linear is given twice" in twice.err


@pytest.mark.exhaustive
def test_a_method_can_have_its_own_learning_rate(petune: Run, tiny: Words, tmp_path: Path) -> None:
    words = ("compare", "linear", "full", *tiny, "--lr=0.02", "--set=lrs.full=0.001")
    assert petune(*words).code == 0
    rates = {
        method: yaml.safe_load((place / "config.yaml").read_text())["train"]["lr"]
        for method in ("linear", "full")
        for place in (tmp_path / "runs" / "compare-vit_nano-digits").glob(f"{method}-*")
    }
    assert rates == {"linear": 0.02, "full": 0.001}
    done = petune("compare", "vpt:deep=false", "lora:lora_dropout=0.1", *tiny, "--set=lrs.vpt:deep=false=1e-3",
                  "--set=lrs.lora:lora_dropout=0.1=0.5", "--output=other", "--dry-run")  # fmt: skip
    assert yaml.safe_load(done.out)["lrs"] == {"vpt:deep=false": 0.001, "lora:lora_dropout=0.1": 0.5}, done.err
    (tmp_path / "a.yaml").write_text("lrs: 3\n")
    for words in (("--set=lrs.linear",), ("--config=a.yaml", "--set=lrs.linear=1")):
        assert petune("compare", "linear", *tiny, *words).err.startswith("error: ")
    wrong = petune("compare", "linear", *tiny, "--set=lrs.linar=0.1")
    assert wrong.code == 2
    assert "linar is not a method of this comparison. Did you mean linear?" in wrong.err
