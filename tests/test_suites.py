"""The suites of benchmarks/ can be run at both sizes, and their numbers are checked against ranges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import suite
import tables
import yaml
from joined import joined

from petune.base.metric import Metric
from petune.injector.registry import build_tuner
from petune.runner.compare_config import CompareConfig
from petune.runner.comparison import Comparison, Row
from petune.runner.result import RunResult
from petune.runner.stored_config import flatten
from tests.sampling import sampled

NAMES = ("blocks", "cifar-small", "few-shot", "mini-vtab", "paddle_study", "precision")
TINY = """\
command: python benchmarks/suite.py tiny
expected:
  one:
    linear: {top1: 50, range: [0, 100], source: nobody}
    bitfit - linear: {top1: 500, range: [400, 600]}
about: A test.
pieces:
  one:
    rates: {values: {default: [0.01, 0.003], linear: [0.02]}, run: {train: {epochs: 1}}}
    compare:
      methods: [linear, bitfit]
      seeds: [0, 1]
      run:
        backbone: vit_nano
        weights: none
        backbone_options: {depth: 2, embed_dim: 48}
        dataset: digits
        device: cpu
        shots: 10
        train: {epochs: 2, precision: fp32, batch_size: 32}
smoke: {expected: {linear: {top1: 1, range: [0, 2]}}, compare: {seeds: [0]}, pretrain: {epochs: 1}}
"""


TOP1 = Metric(name="top1", label="top-1", percent=True)


def test_all_suites_are_known() -> None:
    assert tuple(sorted(file.stem for file in suite.SUITES.glob("*.yaml"))) == NAMES


@pytest.mark.parametrize("smoke", sampled([False, True], bool), ids=["whole", "smoke"])
@pytest.mark.parametrize("name", NAMES)
def test_a_suite_starts_with_command_and_expectations_and_every_piece_can_be_built(name: str, smoke: bool) -> None:
    text = (suite.SUITES / f"{name}.yaml").read_text()
    assert text.startswith(f"command: python benchmarks/suite.py {name}\n")
    assert list(yaml.safe_load(text))[:2] == ["command", "expected"]
    read = suite.read_suite(name, smoke)
    assert read.expected.keys() == read.pieces.keys()
    for piece_name, piece in read.pieces.items():
        methods = suite.chosen(read, [piece_name])[piece_name]
        directory = Path("nowhere") / piece_name
        config = suite.compare_config(piece, directory, methods, {})
        pretraining = suite.pretrain_config(piece, directory)
        assert config.run.weights == ("default" if pretraining is None else str(directory / "pretrain"))
        for method in methods:
            build_tuner(method)
            if piece.rates:
                assert suite.rate_config(piece, directory, method).run.method == method
        for what, one in read.expected[piece_name].items():
            assert set(map(str.strip, what.split(" - "))) <= set(methods)
            assert one.range[0] <= one.top1 <= one.range[1]
        if smoke:
            assert config.run.dataset == "digits"  # it needs no files
            assert config.run.train.epochs <= 4


def test_the_paddle_study_has_the_recipe_of_the_study() -> None:
    piece = suite.read_suite("paddle_study").pieces["paddle_study"]
    pretraining = suite.pretrain_config(piece, Path("p"))
    moving = suite.compare_config(piece, Path("p"), tuple(piece.compare["methods"]), {}).run
    assert pretraining is not None
    assert (pretraining.train.epochs, moving.train.epochs) == (80, 10)
    for config in (pretraining, moving):
        train = config.train
        assert config.backbone == "vit_paddle_study"
        assert (train.optimizer, train.lr, train.weight_decay, train.decay_vectors) == ("momentum", 0.01, 5e-4, True)
        assert (train.batch_size, train.warmup_steps(31_000), train.schedule) == (128, 2000, "cosine")
        assert (train.augment, train.label_smoothing, train.mixup, train.grad_clip) == ("paddle_study", 0, 0, None)
    assert (pretraining.mean, pretraining.std) == ((0.5071, 0.4865, 0.4409), (0.1942, 0.1918, 0.1958))
    assert build_tuner(pretraining.method).config.model_dump() == {
        "blocks": "all", "bottleneck": 64, "scale": None, "dropout": 0.1, "input": None, "variant": "paddle_study",
        "train_backbone": True,
    }  # fmt: skip


def _run(capture: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    capture.readouterr()
    with pytest.raises(SystemExit) as stopped:
        suite.main(list(words))
    return stopped.value.code, *capture.readouterr()


@pytest.mark.exhaustive
def test_rates_are_chosen_on_val_numbers_checked_and_results_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("suites", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(suite, name.upper(), tmp_path / name)
        monkeypatch.setattr(tables, name.upper(), tmp_path / name)
    (tmp_path / "suites" / "tiny.yaml").write_text(TINY)
    assert _run(capsys, "tiny", "--finished")[:2] == (0, "")  # nothing is
    _, first, _ = _run(capsys, "tiny", "--only", "linear", "--seeds", "1")
    assert "linear: rate 0.02" in first
    assert _run(capsys, "tiny", "--finished", "--seeds", "0")[:2] == (0, "")
    _, read, err = _run(capsys, "tiny", "--finished")
    assert "epoch" not in err  # it trains nothing
    assert "linear: rate 0.02" in read
    assert "bitfit" not in read  # whose difference from linear is not held to a range either
    code, out, err = _run(capsys, "tiny", "--keep")
    assert code == 1, err
    assert "expected 50 within 0 to 100: in range" in out
    assert "expected 500 within 400 to 600: OUT OF RANGE" in out
    record = json.loads((tmp_path / "results" / "one" / "suite.json").read_text())
    tried = record["rates"]["bitfit"]["tried"]
    assert list(tried) == ["0.003", "0.01"]
    assert record["rates"]["bitfit"]["lr"] == float(max(tried, key=lambda lr: (tried[lr], -float(lr))))
    assert (record["rates"]["bitfit"]["edge"], record["rates"]["linear"]["edge"]) == (True, False)
    kept = json.loads((tmp_path / "results" / "one" / "compare.json").read_text())
    assert {row["method"]: row["lr"] for row in kept["rows"]} == {m: r["lr"] for m, r in record["rates"].items()}
    assert list((tmp_path / "runs").rglob("rates/*/*/result.json")) == []  # choosing a rate reads no test

    code, again, err = _run(capsys, "tiny", "--only", "linear")
    assert code == 0
    assert "linear, seed 1: finished before" in err
    assert "bitfit" not in again
    code, _, _ = _run(capsys, "tiny", "--only", "linaer")
    assert "--only: no such piece or method: linaer" in str(code)

    (result,) = (tmp_path / "runs").rglob("compare/linear*seed1/result.json")
    result.write_text(result.read_text().replace('"lr": 0.02', '"lr": 0.5'))
    code, _, _ = _run(capsys, "tiny", "--finished", "--only", "linear", "--seeds", "1")
    assert "finished runs of linear have another learning rate" in str(code)

    page = tables.overview(tables.read_results(), tables.read_suites())
    linear = next(row["mean"]["top1"] for row in kept["rows"] if row["method"] == "linear")
    assert f"| one | `linear` | 50 | 0 to 100 | {linear:.2f} | in range | nobody |" in page
    assert "| **out of range** |" in page
    assert f"- `bitfit`: {'**' if record['rates']['bitfit']['lr'] == 0.003 else ''}0.003 " in page


@pytest.mark.exhaustive
def test_results_of_two_machines_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(name: str) -> dict[str, dict[str, object]]:
        kept = json.loads((tmp_path / name / "one" / "compare.json").read_text())
        for row in kept["rows"]:
            for key in ("images_per_s", "step_time_s", "peak_memory_bytes", "time_s"):
                del row[key]
            row["metrics"] = {f"{name} {i}": v for name, vs in row["metrics"].items() for i, v in enumerate(vs)}
        return {row["method"]: row for row in kept["rows"]}

    monkeypatch.chdir(tmp_path)
    for name in ("suites", "whole", "pieces"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(suite, "SUITES", tmp_path / "suites")
    (tmp_path / "suites" / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(suite, "RESULTS", tmp_path / "whole")
    _run(capsys, "tiny", "--output", "one", "--seeds", "0", "1", "2", "--keep")

    monkeypatch.setattr(suite, "RESULTS", tmp_path / "pieces")
    _run(capsys, "tiny", "--output", "a", "--seeds", "0", "1", "--only", "linear", "--keep")
    shutil.rmtree("a")  # another machine
    _, shown, err = _run(capsys, "tiny", "--output", "b", "--seeds", "2", "--only", "linear", "--kept-rates", "--keep")
    assert "trial" not in err
    assert "linear: rate 0.02" in shown
    _run(capsys, "tiny", "--output", "c", "--seeds", "0", "1", "2", "--only", "bitfit", "--keep")
    whole, both = rows("whole"), rows("pieces")
    assert list(whole) == list(both) == ["linear", "bitfit"]
    for method, row in whole.items():
        merged, expected = flatten(both[method]), flatten(row)
        assert merged.get("difference") is merged.get("standing") is None, "parts were compared with their own best"
        expected = {k: v for k, v in expected.items() if k.split(".")[0] not in {"difference", "standing"}}
        assert {key: pytest.approx(merged[key]) for key in expected} == expected, method
    record = json.loads((tmp_path / "pieces" / "one" / "suite.json").read_text())
    assert record == json.loads((tmp_path / "whole" / "one" / "suite.json").read_text())

    words = ("tiny", "--only", "linear", "--kept-rates", "--keep")
    code, _, err = _run(capsys, *words, "--output", "d", "--seeds", "2", "3")
    assert code == 1
    assert "one is not kept: linear: seeds (0, 1, 2) are committed and (2, 3) were measured" in err
    assert rows("pieces") == both
    _run(capsys, "tiny", "--output", "one", "--seeds", "1", "--only", "linear", "--keep")  # some of the committed seeds
    assert rows("pieces") == both
    (tmp_path / "suites" / "tiny.yaml").write_text(TINY.replace("epochs: 2, precision", "epochs: 1, precision"))
    code, _, err = _run(capsys, *words, "--output", "e", "--seeds", "3")
    assert code == 1
    assert "have another recipe or backbone" in err
    _, shown, err = _run(capsys, "tiny", "--output", "e", "--seeds", "3", "--only", "linear", "--finished")
    assert "linear: rate 0.02" in shown  # the committed one, since none was chosen there
    (tmp_path / "pieces" / "one" / "compare.json").unlink()
    code, _, _ = _run(capsys, "tiny", "--output", "e", "--seeds", "3", "--only", "linear", "--finished")
    assert "no learning rate for linear in e/one" in str(code)


def _table(
    device: str, train: Mapping[str, object] | None = None, precision: str = "bf16", **seeds: tuple[int, ...]
) -> Comparison:
    measured = {
        "tuned": 1, "head": 1, "total": 9, "percent_of_total": 1, "percent_of_backbone": 1, "adapter_bytes": 1,
        "lr": 0.1, "mean": {"top1": 50, "top5": 90}, "images_per_s": 1, "peak_memory_bytes": 1, "time_s": 1,
    }  # fmt: skip
    rows = tuple(
        Row.build(
            {"method": m, "status": "done", "seeds": s, "metrics": {"top1": (50.0,) * len(s)}, **measured}, "test"
        )
        if s
        else Row(method=m, status="failed", reason="it could not be done")
        for m, s in seeds.items()
    )
    run = {"train": dict(train or {})}
    config = CompareConfig.build({"methods": tuple(seeds), "seeds": (0,), "run": run}, "test")
    place = {"device": device, "threads": 1, "precision": precision, "versions": {}, "git": None}
    return Comparison(
        task="classification",
        metric_info=(TOP1,),
        config=config,
        rows=rows,
        backbone="b",
        weights="w",
        provenance=place,
        output="o",
    )


def test_a_merged_table_records_where_each_run_was_measured() -> None:
    one = joined(_table("a", linear=(0, 1), vpt=(0,), full=(0, 1)), _table("b", vpt=(1,), full=(0, 1)), ["full", "vpt"])
    assert [origin.runs for origin in one.origins] == [{"linear": (0, 1), "vpt": (0,)}, {"vpt": (1,), "full": (0, 1)}]
    assert [row.method for row in one.rows] == ["full", "vpt", "linear"]
    table = _table("a", linear=(0,), vpt=(0,))
    rows = tuple(row.model_copy(update={"standing": "best"}) for row in table.rows)
    compared = table.model_copy(update={"rows": rows, "conclusion": "vpt has the highest top-1."})
    both = joined(compared, _table("b", full=(0,)), [])
    assert ([row.standing for row in both.rows], both.conclusion) == ([None] * 3, "")  # each had its own best method
    same = joined(_table("a", linear=(0, 1)), _table("a", linear=(2,)), ["linear"])
    assert (same.origins, same.config.seeds, same.rows[0].seeds) == ((), (0, 1, 2), (0, 1, 2))
    assert joined(_table("a", linear=(0, 1)), _table("b", linear=(1,)), []).rows[0].seeds == (0, 1)  # nothing new
    again = _table("b", vpt=(0, 1), linear=(0,))
    assert joined(_table("a", vpt=(1,), linear=(0,)), again, [], one_backbone=False) == again
    with pytest.raises(ValueError, match="another recipe or backbone"):
        joined(_table("a", vpt=(2,)), again, [], one_backbone=False)
    part = joined(_table("a", linear=(0, 1)), _table("b", linear=(1,)), [])
    assert part.provenance["device"] == "a"  # where all of its runs were measured
    failed = _table("b", full=())
    assert joined(_table("a", linear=(0,)), failed, []) == _table("a", linear=(0,))
    broken = joined(_table("a", linear=(0,), vpt=()), _table("b", linear=(0,)), [])
    assert [row.method for row in broken.rows] == ["linear", "vpt"]
    other = _table("b", linear=(1,))
    other = other.model_copy(update={"rows": (other.rows[0].model_copy(update={"lr": 0.5}),)})
    with pytest.raises(ValueError, match="linear: the committed row has another lr"):
        joined(_table("a", linear=(0, 1)), other, [])


def test_results_can_be_kept_again_after_a_kill_between_the_table_and_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def done(**seeds: tuple[int, ...]) -> dict[str, object]:
        return {"compare": _table("a", **seeds).model_dump(mode="json"), "rates": {}, "pretrain": None}

    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    suite.keep(done(linear=(0,)), "one", [])
    assert not (tmp_path / "one" / "suite.json").exists()  # the caller writes it
    suite.keep(done(vpt=(0,)), "one", [])
    assert [row.method for row in Comparison.read(tmp_path / "one").rows] == ["linear", "vpt"]


def test_a_pretraining_of_an_older_petune_is_the_same_without_the_fields_of_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    result = RunResult.read(Path(__file__).parent / "golden" / "v0" / "vpt").model_dump(mode="json")
    record = {"pretrain": {key: value for key, value in result.items() if key != "stopped_early"}, "rates": {}}
    (tmp_path / "one").mkdir()
    _table("a", linear=(0,)).write(tmp_path / "one")
    (tmp_path / "one" / "suite.json").write_text(json.dumps(record))
    new = {"compare": _table("a", vpt=(0,)).model_dump(mode="json"), "rates": {}}
    with pytest.raises(ValueError, match="another recipe or backbone"):
        suite.keep({**new, "pretrain": {**result, "seed": 7}}, "one", [])
    suite.keep({**new, "pretrain": result}, "one", [])
    assert [row.method for row in Comparison.read(tmp_path / "one").rows] == ["linear", "vpt"]


def test_the_precision_can_differ_but_not_the_recipe() -> None:
    new = _table("new", {"precision": "bf16", "epochs": 4}, linear=(0,))
    old = _table("old", {"precision": "auto", "epochs": 4}, precision="fp32", linear=(1,))
    one = joined(new, old, [])
    assert one.rows[0].seeds == (0, 1)
    assert [(o.runs, o.provenance["precision"]) for o in one.origins] == [
        ({"linear": (0,)}, "bf16"),
        ({"linear": (1,)}, "fp32"),
    ]
    with pytest.raises(ValueError, match="another recipe or backbone"):
        joined(new, _table("old", {"precision": "auto", "epochs": 5}, precision="fp32", linear=(1,)), [])


def test_the_nearest_to_full_is_named() -> None:
    def row(method: str, percent: float, **top1: float) -> dict[str, object]:
        mean = sum(top1.values()) / len(top1)
        seeds = {
            "seeds": [int(seed[1:]) for seed in top1],
            "metrics": {"top1": [*top1.values()]},
            "mean": {"top1": mean},
        }
        return {"method": method, "status": "done", "percent_of_backbone": percent, **seeds}

    rows = [row("a", 1.0, s0=78.9), row("b", 2.0, s0=79.4), row("c", 3.0, s0=79.9), row("full", 100.0, s0=80, s1=70)]
    nearest = tables.near_full({"rows": rows})
    assert "(75.00)" in nearest
    assert "`b`, 0.60 below" in nearest
    assert "2.00 % trained" in nearest
    assert "The nearest is `a`, 1.10 below" in tables.near_full({"rows": [rows[0], rows[3]]})
    assert tables.near_full({"rows": rows[:3]}) == tables.near_full({"rows": [row("a", 1.0, s2=78.9), rows[3]]}) == ""


def test_a_difference_uses_the_seeds_of_both() -> None:
    one = {"seeds": [0, 1], "metrics": {"top1": [80.0, 50.0]}}
    other = {"seeds": [2, 0], "metrics": {"top1": [10.0, 79.0]}}
    assert suite.difference(one, other) == 1.0
    assert suite.difference(one, None) is suite.difference(one, {"seeds": [2], "metrics": {"top1": [10.0]}}) is None


def test_a_page_is_filled_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- results:begin -->\nold\n<!-- results:end -->\nb\n")
    assert tables.filled(page, "new") == "a\n<!-- results:begin -->\nnew\n<!-- results:end -->\nb\n"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="needs the markers"):
        tables.filled(page, "new")
