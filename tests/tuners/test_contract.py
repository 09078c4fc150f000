"""Every registered tuner keeps the contract."""

from __future__ import annotations

import pytest

import petune


@pytest.mark.parametrize("name", [t.name for t in petune.tuners()])
def test_every_registered_tuner_keeps_the_contract(name: str) -> None:
    assert len(petune.check_tuner(name)) >= 8


@pytest.mark.parametrize("options", [{"deep": False}, {"num_prompts": 3}])
def test_vpt_variants(options: dict[str, object]) -> None:
    petune.check_tuner("vpt", **options)


@pytest.mark.parametrize("options", [{"variant": "seed"}, {"input": "norm"}, {"scale": "learnable"}])
def test_adaptformer_variants(options: dict[str, object]) -> None:
    petune.check_tuner("adaptformer", **options)
