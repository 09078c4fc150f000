"""A pytest fixture that checks the contract, so that a plugin's test is one line:

    def test_contract(petune_contract): petune_contract("ssf")

The test runs once for each installed library that has a tiny model: timm, torchvision, transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests of the fixture once for each installed library."""
    if "petune_contract" in metafunc.fixturenames:
        from petune.plugin_dev.tiny_models import tiny_models

        metafunc.parametrize("petune_contract", list(tiny_models()), indirect=True)


@pytest.fixture
def petune_contract(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return `petune_contract(name or Tuner, **options)`, which fails with every property that does not hold.

    A model that the tuner refuses (AttachError) is skipped with the reason. What the tuner warns about, such as layers
    that it leaves as they are, is no failure even where pytest turns warnings into errors.
    """
    from petune.plugin_dev.tiny_models import tiny_models

    def check(tuner: Any, **options: Any) -> None:
        from petune.base.errors import AttachError
        from petune.plugin_dev.contract import examine

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", UserWarning)
                findings = list(examine(tuner, tiny_models()[request.param](), **options))
        except AttachError as error:
            pytest.skip(str(error))
        problems = [f"{finding.name}: {finding.problem}" for finding in findings if finding.problem]
        assert not problems, "\n".join(["these properties of the contract do not hold:", *problems])

    return check
