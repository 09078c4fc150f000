"""Every registered tuner meets the contract."""

from __future__ import annotations

import pytest

import petune
from petune.base.errors import ConfigError
from petune.plugin_dev.tiny_models import tiny_models
from tests.sampling import sampled

NAMES = [t.name for t in petune.list_tuners() if t.name != "peft"]  # it needs a type, see test_peft.py


@pytest.mark.parametrize("library", sampled(sorted(tiny_models()), "timm".__eq__))
@pytest.mark.parametrize("name", sampled(NAMES, {"adaptformer", "vpt", "lora", "lst", "fact", "full"}.__contains__))
@pytest.mark.filterwarnings("ignore:VisionTransformer reads the weights", "ignore:ssf leaves .* layers as they are")
def test_every_registered_tuner_meets_the_contract(name: str, library: str) -> None:
    assert petune.check_tuner(name, tiny_models()[library]())


def test_built_in_and_plugin_tuners_are_listed() -> None:
    assert {"adaptformer", "lora", "lst", "ssf", "convpass", "l2sp", "prefix", "gps", "sct"} <= set(NAMES)


@pytest.mark.parametrize("options", [{"deep": False}, {"num_prompts": 3}])
def test_vpt_variants(options: dict[str, object]) -> None:
    petune.check_tuner("vpt", **options)


def test_fact_in_tuckers_form() -> None:
    petune.check_tuner("fact", form="tk")


@pytest.mark.parametrize("options", [{"variant": "paddle_study"}, {"input": "norm"}, {"scale": "learnable"}])
def test_adaptformer_variants(options: dict[str, object]) -> None:
    petune.check_tuner("adaptformer", **options)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("adaptformer", {"scale": 0}, "scale.*: should be greater than 0"),
        ("fact", {"scale": 0.0}, "scale.*: should be greater than 0"),
        ("repadapter", {"scale": 0}, "scale.*: should be greater than 0"),
        ("convpass", {"scale": 0}, "scale.*: should be greater than 0"),
        ("lora", {"lora_alpha": 0}, "lora_alpha: should be greater than 0"),
        ("lora", {"lora_dropout": 1}, "lora_dropout: should be less than 1"),
        ("dora", {"r": 0}, "r: should be greater than or equal to 1"),
    ],
)
def test_options_that_would_disable_a_method_are_refused(method: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        petune.check_tuner(method, **options)
