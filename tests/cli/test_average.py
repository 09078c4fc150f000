"""`petune average` and `petune convert`, on runs of a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from petune import average_adapters
from tests.program import Run
from tests.trained import saved_run


@pytest.fixture
def runs(petune: Run, tiny: tuple[str, ...], tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of LoRA on one random backbone: the second one continues the first, with another seed."""
    one = petune("run", "--method=lora:r=2", *tiny, "--output=one")
    assert one.code == 0, one.err
    two = petune("run", "--from=one", "--seed=1", "--epochs=1", "--device=cpu", "--precision=fp32", "--output=two")
    assert two.code == 0, two.err
    return tmp_path / "one", tmp_path / "two"


def test_an_interrupted_greedy_soup_leaves_nothing_and_starts_again(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    values = iter([0.5, 0.6, None, 0.5, 0.6, 0.7])

    def value() -> float:
        if (given := next(values)) is None:
            raise KeyboardInterrupt
        return given

    monkeypatch.setattr("petune.serving.average.averaging.val_scorer", lambda *_: value)
    with pytest.raises(KeyboardInterrupt):
        average_adapters(runs, tmp_path / "soup", algorithm="greedy", device="cpu")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "soup").exists()
    done = average_adapters(runs, tmp_path / "soup", algorithm="greedy", device="cpu")
    assert done.val == 0.7
    assert [adapter.coefficient for adapter in done.adapters] == [0.5, 0.5]


def test_a_greedy_soup(petune: Run, runs: tuple[Path, Path], tmp_path: Path) -> None:
    planned = petune("average", "one", "two", "--output=soup", "--algorithm=greedy", "--dry-run")
    assert planned.code == 0, planned.err
    assert "nothing was written" in planned.err
    assert not (tmp_path / "soup").exists()
    done = petune("average", "one", "two", "--output=soup", "--algorithm=greedy", "--device=cpu", "--json")
    assert done.code == 0, done.err
    averaged = json.loads(done.out)
    vals = {adapter["path"]: adapter["val"] for adapter in averaged["adapters"]}
    for name in ("one", "two"):  # what `petune eval` finds on the same images
        evaluation = petune("eval", name, "--split=val", "--device=cpu", "--precision=fp32", "--json")
        assert json.loads(evaluation.out)["top1"] == pytest.approx(vals[name], abs=1e-3)
    assert averaged["metric"] == "top1"
    assert averaged["val"] >= max(vals.values())
    tested = petune("eval", "soup", "--device=cpu", "--json")
    assert tested.code == 0, tested.err
    found = petune("eval", "soup", "--split=val", "--device=cpu", "--precision=fp32", "--json")
    assert json.loads(found.out)["top1"] == pytest.approx(averaged["val"], abs=1e-3), found.err
    config = tmp_path / "two" / "config.yaml"
    config.write_text(config.read_text().replace("val_fraction: 0.1", "val_fraction: 0.2"))
    refused = petune("average", "one", "two", "--output=other", "--algorithm=greedy")
    assert refused.code == 2
    assert "val_fraction is 0.1 and 0.2" in refused.err
    wrong = petune("average", "one", "two", "--output=other", "--coefficients=a,b")
    assert (wrong.code, "--coefficients" in wrong.err) == (2, True)
    single = petune("average", "one", "--output=other")
    assert (single.code, "one adapter is given" in single.err) == (2, True)
    shutil.rmtree(tmp_path / "one" / "adapter")
    gone = petune("average", "one", "two", "--output=other")
    assert gone.code == 4
    assert not (tmp_path / "other").exists()


def test_convert(petune: Run, tmp_path: Path) -> None:
    saved_run(tmp_path / "one", "lora", r=2)
    planned = petune("convert", "one", "--output=lora", "--rank=1", "--dry-run", "--json")
    assert planned.code == 0, planned.err
    assert not (tmp_path / "lora").exists()
    errors = json.loads(planned.out)["errors"]
    assert 0 < max(errors.values()) < 1
    done = petune("convert", "one", "--to=peft-lora", "--output=lora")
    assert done.code == 0, done.err
    assert "rank          2" in done.out
    assert petune("convert", "one", "--output=lora").code == 2  # it exists
