"""A method's recipes by name: AdaptFormer's `official` is its authors'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import petune
from petune.base.errors import ConfigError
from petune.injector.registry import build_tuner
from petune.runner.compare_config import CompareConfig
from petune.runner.pretrain import PretrainConfig
from petune.runner.recipes import choose_recipe, complete_from_recipe
from petune.runner.run_config import RunConfig

TINY: dict[str, Any] = {
    "method": "adaptformer:bottleneck=4", "backbone": "vit_nano", "weights": "none", "dataset": "digits", "shots": 5,
    "device": "cpu", "backbone_options": {"depth": 1, "embed_dim": 24, "num_heads": 2}, "recipe": "official",
}  # fmt: skip


@pytest.mark.parametrize("batch_size", [64, 128, 256])
def test_the_learning_rate_is_a_tenth_of_the_batch_over_256(batch_size: int) -> None:
    recipe = choose_recipe(build_tuner("adaptformer"), "official")
    assert recipe.peak_lr(batch_size) == pytest.approx(0.1 * batch_size / 256)
    assert petune.Recipe(lr=1e-3).peak_lr(batch_size) == 1e-3


def test_what_a_run_leaves_open_is_filled_in() -> None:
    config = complete_from_recipe(RunConfig(recipe="official"), ["adaptformer"])
    assert (config.train.epochs, config.train.warmup, config.head) == (100, 0.2, "bn_linear")
    given = RunConfig.build({"recipe": "official", "head": "linear", "train": {"epochs": 3}})
    kept = complete_from_recipe(given, ["adaptformer"])
    assert (kept.train.epochs, kept.train.warmup, kept.head) == (3, 0.2, "linear")
    assert complete_from_recipe(kept, ["adaptformer"]) == kept


def test_a_recipe_sets_options_of_the_method_that_are_left_open() -> None:
    config = complete_from_recipe(RunConfig(recipe="video"), ["adaptformer"])
    assert (config.method, config.head, config.train.epochs) == ("adaptformer:dropout=0.0", "bn_linear", 90)
    assert complete_from_recipe(config, [config.method]) == config
    given = "adaptformer:bottleneck=8,dropout=0.2"
    assert complete_from_recipe(RunConfig(method=given, recipe="video"), [given]).method == given
    methods = ("linear", "adaptformer:bottleneck=8")
    compared = CompareConfig(methods=methods, lrs={methods[1]: 0.3}, baseline="linear", run=RunConfig(recipe="video"))
    complete = compared.completed()
    assert complete.methods == ("linear", "adaptformer:bottleneck=8,dropout=0.0")
    assert (complete.lrs, complete.baseline) == ({complete.methods[1]: 0.3}, "linear")
    assert complete.completed() == complete
    same = CompareConfig(methods=("adaptformer", "adaptformer:dropout=0.0"), run=RunConfig(recipe="video"))
    with pytest.raises(ConfigError, match=r"adaptformer and adaptformer:dropout=0\.0 are one method"):
        same.completed()


def test_a_run_trains_with_it(tmp_path: Path) -> None:
    train = {"epochs": 1, "batch_size": 32, "precision": "fp32"}
    result = petune.run(**TINY, train=train, output=tmp_path / "run")
    assert result.lr == pytest.approx(0.1 * 32 / 256)
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert (inputs["optimizer"], inputs["weight_decay"]) == ("momentum", 0.0)
    tensors = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert tensors["metadata"]["backbone"]["head"] == "bn_linear"
    assert petune.evaluate(tmp_path / "run").top1 == pytest.approx(result.top1)
    again = petune.run(**TINY, train=train, output=tmp_path / "run", resume=True)
    assert again.top1 == result.top1


def test_a_comparison_shares_what_its_recipe_sets() -> None:
    methods = ("adaptformer", "adaptformer:bottleneck=8")
    config = CompareConfig(methods=methods, run=RunConfig(recipe="official")).completed()
    assert {run.head for run in config.runs()} == {"bn_linear"}
    with pytest.raises(ConfigError, match="vpt has no recipe 'official'"):
        CompareConfig(methods=("adaptformer", "vpt"), run=RunConfig(recipe="official")).completed()


def test_an_unknown_recipe_suggests_a_known_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean official"):
        complete_from_recipe(RunConfig(recipe="offical"), ["adaptformer"])
    with pytest.raises(ConfigError, match="recipe"):
        PretrainConfig.build({"recipe": "official"})
