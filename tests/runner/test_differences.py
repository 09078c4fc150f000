"""Which differences between methods are noise: intervals over seeds and test images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import petune
from petune.base.errors import ConfigError
from petune.base.metric import Metric
from petune.data.target import Target
from petune.runner.compare_config import CompareConfig
from petune.runner.compare_differences import with_differences
from petune.runner.comparison import Row, summarize
from petune.runner.conclusion import conclusion, describe_intervals
from petune.runner.differences import Difference, SeedValue, difference, differences_to
from petune.runner.report.tables import cells, compare_columns
from petune.runner.test_values import read_test_values, write_test_values
from petune.training.task_registry import task_for

TOP1 = Metric(name="top1", label="top-1", percent=True)
MAE = Metric(name="mae", label="MAE", higher_is_better=False)


def _seed_values(values_SN: Any) -> dict[int, SeedValue]:
    return {seed: SeedValue(float(v.mean()), v.astype(np.float32)) for seed, v in enumerate(values_SN)}


def test_one_seed_is_the_paired_t_interval_over_images() -> None:
    generator = np.random.default_rng(0)
    own, base = (100.0 * (generator.random((1, 200)) < p) for p in (0.8, 0.7))
    found = difference("b", _seed_values(own), _seed_values(base))
    expected = stats.ttest_rel(own[0], base[0]).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-5)
    assert found.mean == pytest.approx((own - base).mean())
    assert found.over_images


def test_without_values_of_images_it_is_the_paired_t_interval_over_seeds() -> None:
    own = {0: SeedValue(3.0), 1: SeedValue(4.0), 2: SeedValue(6.0), 7: SeedValue(0.0)}
    base = {0: SeedValue(2.0), 1: SeedValue(2.5), 2: SeedValue(3.0), 8: SeedValue(9.0)}
    found = difference("b", own, base)
    expected = stats.ttest_rel([3, 4, 6], [2, 2.5, 3]).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high, found.over_images) == (*map(pytest.approx, (expected.low, expected.high)), False)
    assert found.num_seeds == 3


def test_a_row_has_the_epochs_of_its_longest_run() -> None:
    result = petune.RunResult.read(Path(__file__).parents[1] / "golden" / "v0" / "vpt")
    results = [result.model_copy(update={"seed": seed, "epochs": epochs}) for seed, epochs in ((0, 3), (1, 5), (2, 4))]
    assert summarize("vpt:num_prompts=2", results).epochs == 5


def test_intervals_of_several_methods_hold_together() -> None:
    values = {name: {i: SeedValue(value) for i, value in enumerate(text)} for name, text in
              {"a": (3, 4, 6), "b": (2, 2.5, 3), "c": (1, 1, 2)}.items()}  # fmt: skip
    found = differences_to("b", values)
    expected = stats.ttest_rel([3, 4, 6], [2, 2.5, 3]).confidence_interval(1 - 0.05 / 2)
    assert list(found) == ["a", "c"]
    assert (found["a"].low, found["a"].high) == pytest.approx((expected.low, expected.high))


def test_intervals_to_the_best_method_hold_although_it_was_chosen_from_the_same_numbers() -> None:
    """Of 12 equally good methods the best is one of luck: corrected for 11 comparisons, 15 of 100 tables miss."""
    generator = np.random.default_rng(0)
    inside, trials = 0, 300
    for _ in range(trials):
        values = {str(k): {s: SeedValue(v) for s, v in enumerate(generator.normal(80, 0.3, 4))} for k in range(12)}
        best = max(values, key=lambda method: sum(seed.value for seed in values[method].values()))
        found = differences_to(best, values, is_chosen=True)
        inside += all(one.is_clear is False for one in found.values())
    assert inside / trials > 0.93


def test_one_seed_without_values_of_images_has_no_interval() -> None:
    found = difference("b", {0: SeedValue(3.0)}, {0: SeedValue(2.0)})
    assert found == Difference(reference="b", mean=1.0, num_seeds=1)
    assert difference("b", {0: SeedValue(3.0)}, {1: SeedValue(2.0)}) is None
    other_test = difference("b", _seed_values(np.ones((1, 4))), _seed_values(np.zeros((1, 5))))
    assert other_test is not None
    assert other_test.is_clear is None


def test_intervals_over_seeds_and_images_hold_the_truth_as_often_as_they_say() -> None:
    """Images and seeds both vary; intervals over images alone would hold it in about half of the cases."""
    generator = np.random.default_rng(1)
    inside, trials = 0, 400
    for _ in range(trials):
        image, seed = generator.normal(0, 1, 100), generator.normal(0, 0.2, (5, 1))
        own = 0.5 + image + seed + generator.normal(0, 0.5, (5, 100))
        found = difference("b", _seed_values(own), _seed_values(np.zeros((5, 100))))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 0.5 <= found.high
    assert 0.92 < inside / trials < 0.99


def _difference(mean: float, half: float | None, reference: str = "vpt", num_seeds: int = 3) -> Difference:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Difference(
        reference=reference, mean=mean, low=low, high=high, over_images=half is not None, num_seeds=num_seeds
    )


def test_the_sentences_say_what_was_found() -> None:
    to_best = {"linear": _difference(-9, 0.3), "lora": _difference(-1, 1.5), "full": _difference(-0.1, 0.2)}
    text = conclusion("vpt", to_best, {}, TOP1)
    assert "vpt has the highest top-1, 9.00 ± 0.30 points above linear" in text
    assert "lora and full cannot be told apart from it on 3 seeds" in text
    about = describe_intervals(to_best, {})
    assert about == "Intervals of 95 % over seeds and test images that hold together for 6 pairs of methods."
    to_baseline = {"vpt": _difference(9, 0.3, "linear"), "lora": _difference(0.2, 0.4, "linear")}
    text = conclusion("vpt", to_best, to_baseline, TOP1)
    assert "vpt is 9.00 ± 0.30 points above linear; lora cannot be told apart from linear on 3 seeds. vpt has" in text
    many = {name: _difference(-number - 1.0, 0.5) for number, name in enumerate("abcd")}
    assert "vpt has the highest top-1, 1.00 to 4.00 points above a, b, c and d." in conclusion("vpt", many, {}, TOP1)


def test_the_sentences_on_errors_on_one_seed_and_on_nothing() -> None:
    one_seed = {"linear": _difference(0.25, 0.125, num_seeds=1)}
    assert "vpt has the lowest MAE, 0.25 ± 0.125 below linear." in conclusion("vpt", one_seed, {}, MAE)
    assert "one seed says nothing about other seeds" in describe_intervals(one_seed, {})
    mixed = {"a": _difference(-1, 0.5), "b": _difference(-1, 0.5, num_seeds=1)}
    assert "over seeds and test images that hold together for 3 pairs" in describe_intervals(mixed, {})
    assert "those of one seed over test images only" in describe_intervals(mixed, {})
    assert "but linear cannot be told apart" in conclusion("vpt", {"linear": _difference(0.1, 1)}, {}, MAE)
    unknown = {"linear": _difference(-1, None)}
    assert "Too few seeds" in conclusion("vpt", unknown, {}, TOP1)
    assert "too few seeds to compare linear with it" in conclusion(
        "vpt", {"a": _difference(-1, 0.5), **unknown}, {}, TOP1
    )
    assert conclusion("vpt", {}, {}, TOP1) == describe_intervals(unknown, {}) == ""


def _row(method: str, *values: float, metric: str = "mae") -> Row:
    numbers: dict[str, Any] = dict.fromkeys(
        ("tuned", "head", "total", "percent_of_total", "percent_of_backbone", "adapter_bytes", "images_per_s",
         "peak_memory_bytes", "time_s"), 1,
    )  # fmt: skip
    mean = {metric: sum(values) / len(values)}
    seeds = tuple(range(len(values)))
    return Row(method=method, status="done", seeds=seeds, lr=0.1, metrics={metric: values}, mean=mean, **numbers)


def test_the_best_is_marked_and_a_baseline_can_be_named(tmp_path: Path) -> None:
    rows = [_row("linear", 3.0, 3.5), _row("vpt", 2.0, 2.1), Row(method="lora", status="failed", reason="no")]
    config = CompareConfig(methods=("linear", "vpt", "lora"), seeds=(0, 1), output=tmp_path)
    for baseline, column in (
        (None, ["+1.2 [-1.341, +3.741] (tied)", "best"]),
        ("linear", ["baseline (tied)", "-1.2 [-3.741, +1.341] (best)"]),
    ):
        found = with_differences(config.model_copy(update={"baseline": baseline}), rows, MAE)
        plain = [row.model_dump(mode="json") for row in found.rows]
        columns = compare_columns((MAE,), plain)
        assert [cells(row, columns)[2] for row in plain[:2]] == column
        assert "cannot be told apart from" in found.conclusion
        assert [row.standing for row in found.rows] == ["tied", "best", None]
    assert "difference" not in compare_columns((MAE,), [row.model_dump(mode="json") for row in rows])
    with pytest.raises(ConfigError, match=r"bitfit is not a method"):
        CompareConfig.build({"methods": ["linear"], "baseline": "bitfit"})


def test_methods_are_compared_on_the_seeds_that_all_have(tmp_path: Path) -> None:
    """The second seed of linear was lucky; bitfit has only the first one, on which it is 10 points better."""
    rows = [_row("linear", 70.0, 96.0, metric="top1"), _row("bitfit", 80.0, metric="top1")]
    config = CompareConfig(methods=("linear", "bitfit"), seeds=(0, 1), output=tmp_path)
    found = with_differences(config, rows, TOP1)
    assert [row.standing for row in found.rows] == [None, "best"]
    assert found.rows[0].difference == Difference(reference="bitfit", mean=-10.0, num_seeds=1)
    assert found.conclusion.startswith("bitfit has the highest top-1 on 1 seed that all have. Too few seeds")
    other = rows[1].model_copy(update={"seeds": (5,)})
    assert with_differences(config, [rows[0], other], TOP1).conclusion.startswith("No seed was run with all methods")


def test_the_speed_of_runs_on_videos_is_in_clips() -> None:
    images, clips = ([_row("vpt", 2.0, metric="top1").model_copy(update={"num_frames": n})] for n in (None, 4))
    for rows, speed, other in ((images, "images/s", "clips/s"), (clips, "clips/s", "images/s")):
        columns = compare_columns((TOP1,), [row.model_dump(mode="json") for row in rows])
        assert speed in columns
        assert other not in columns


def test_damaged_or_missing_values_of_images_count_as_none(tmp_path: Path) -> None:
    assert read_test_values(tmp_path) == {}
    write_test_values(tmp_path, {"top1": np.ones(3, np.float32)})
    assert read_test_values(tmp_path)["top1"].tolist() == [1, 1, 1]
    (tmp_path / "test_values.npz").write_bytes(b"PK\x03\x04 cut")
    assert read_test_values(tmp_path) == {}


def test_values_of_images_average_to_the_metric() -> None:
    task = task_for("classification", Target("class", tuple("abcdefg")), "toy")
    outputs, targets = torch.randn(40, 7), torch.arange(40) % 7
    meter = task.new_meter()
    meter.update(outputs, targets)
    values = task.image_values(outputs, targets)
    assert {name: float(v.mean()) for name, v in values.items()} == pytest.approx(
        {name: meter.compute()[name] for name in ("top1", "top5")}
    )


@pytest.mark.exhaustive
def test_a_comparison_stores_values_and_says_what_it_found(tmp_path: Path) -> None:
    run = {
        "backbone": "vit_nano", "weights": "none", "backbone_options": {"depth": 2, "embed_dim": 24, "num_heads": 2},
        "dataset": "digits", "shots": 5, "device": "cpu", "train": {"epochs": 1, "precision": "fp32", "lr": 0.01},
    }  # fmt: skip
    table = petune.compare(methods=["linear", "bitfit"], run=run, output=tmp_path / "two")
    assert table.conclusion in (tmp_path / "two" / "compare.md").read_text()
    other = next(row for row in table.rows if row.difference is not None)
    assert other.difference is not None
    assert other.difference.low is not None
    for row in table.rows:
        values = read_test_values(tmp_path / "two" / f"{row.method}-vit_nano-digits-seed0")
        assert values["top1"].mean() == pytest.approx(row.mean["top1"], abs=1e-3)
        assert values["loss"].shape == values["top1"].shape
    assert petune.Comparison.read(tmp_path / "two") == table
