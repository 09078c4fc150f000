"""What `petune` shows is what it lists, importing it is cheap, and functions stay functions."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import petune


def test_all_is_what_can_be_had() -> None:
    assert petune.__all__ == sorted(petune.__all__)
    for name in petune.__all__:
        assert getattr(petune, name).__name__ == name
        assert name in dir(petune)
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        petune.atach  # noqa: B018


@pytest.mark.parametrize("name", petune.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(petune, name))


ORDERS = {
    "submodule first": "import petune.injector.attach, petune.runner.run, petune.runner.pretrain",
    "name from submodule": "from petune.runner.run_config import RunConfig; from petune.injector import attach",
    "function first": "petune.injector.attach; petune.runner.run; import petune.injector.attach, petune.runner.run",
    "whole program": "import petune.cli.main, petune.cli.run, petune.cli.compare, petune.cli.pretrain",
}


@pytest.mark.parametrize("order", ORDERS)
def test_functions_are_not_hidden_by_modules_of_the_same_name(order: str) -> None:
    code = (
        f"import petune, types\n{ORDERS[order]}\nfor n in ('attach', 'run', 'compare', 'pretrain', 'load', 'tuners'):\n"
        " assert isinstance(getattr(petune, n), types.FunctionType), n\n"
        "from petune import attach\nassert isinstance(attach, types.FunctionType)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_petune_imports_nothing_heavy() -> None:
    code = "import petune, sys; print([m for m in ('torch', 'timm', 'peft', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
