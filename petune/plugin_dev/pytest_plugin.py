"""For authors of tuners: a fixture that proves the contract, so that a plugin's test is one line.

    def test_contract(petune_contract): petune_contract("ssf")

It runs once for each library with tiny models that is installed: timm, torchvision, transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Once for each installed library."""
    if "petune_contract" in metafunc.fixturenames:
        from petune.plugin_dev.tiny_models import tiny_models

        metafunc.parametrize("petune_contract", list(tiny_models()), indirect=True)


@pytest.fixture
def petune_contract(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`petune_contract(name or Tuner, **options)` fails with every property that does not hold.

    A model that the tuner refuses (AttachError) is skipped with the reason.
    """
    from petune.plugin_dev.tiny_models import tiny_models

    def check(tuner: Any, **options: Any) -> None:
        from petune.base.errors import AttachError
        from petune.plugin_dev.contract import examine

        try:
            found = list(examine(tuner, tiny_models()[request.param](), **options))
        except AttachError as refused:
            pytest.skip(str(refused))
        broken = [f"{finding.name}: {finding.problem}" for finding in found if finding.problem]
        assert not broken, "\n".join(["these properties of the contract do not hold:", *broken])

    return check
