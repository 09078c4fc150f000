"""The public names: what `petune` lists can be imported, importing petune is cheap, and errors are documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import petune
import petune.base.errors

ROOT = Path(petune.__file__).parent
ERRORS = {
    name: error
    for name, error in vars(petune.base.errors).items()
    if inspect.isclass(error) and issubclass(error, petune.PetuneError)
}


def test_every_public_name_can_be_imported() -> None:
    assert petune.__all__ == sorted(petune.__all__)
    for name in petune.__all__:
        assert getattr(petune, name).__name__ == name
        assert name in dir(petune)
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        petune.atach  # noqa: B018


@pytest.mark.parametrize("name", petune.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(petune, name))


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(map(str, seen)) == petune.__all__
    for name, module in seen.items():
        assert getattr(importlib.import_module(str(module)), str(name)) is getattr(petune, str(name))


def test_no_error_is_defined_elsewhere() -> None:
    """A public class that is an exception is a PetuneError; private ones never reach users."""
    defined = re.compile(r"^class ([A-Z]\w*)\(.*(?:Error|Exception|Warning)\)", re.MULTILINE)
    files = [file for file in ROOT.rglob("*.py") if file != ROOT / "base" / "errors.py"]
    assert [name for file in files for name in defined.findall(file.read_text(encoding="utf-8"))] == []
    assert issubclass(petune.ContractViolation, AssertionError)


def test_every_error_is_public_and_in_the_tree() -> None:
    tree = (petune.base.errors.__doc__ or "").splitlines()
    drawn = {match[2]: match.start(2) for line in tree if (match := re.match(r"((?:[│├└─ ]{4})*)([A-Z]\w+)  ", line))}
    assert set(drawn) == set(ERRORS)
    assert set(ERRORS) <= set(petune.__all__)
    above: dict[int, str] = {}
    for name, indent in drawn.items():
        above[indent] = name
        if indent:
            assert ERRORS[name].__base__ is ERRORS[above[indent - 4]]


IMPORTS = {
    "submodule first": "import petune.injector.attach, petune.runner.run, petune.runner.pretrain",
    "function first": "petune.attach; petune.run; import petune.injector.attach, petune.runner.run",
    "whole program": "import petune.cli.main, petune.cli.run, petune.cli.compare, petune.cli.pretrain",
    "module under a name": "import petune.tuners.adaptformer as m; m.AdaptFormer; import petune.injector.attach as a",
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("imports", IMPORTS)
def test_functions_are_not_hidden_by_modules(imports: str) -> None:
    code = (
        f"import petune, types\n{IMPORTS[imports]}\nfor n in ('attach', 'run', 'compare', 'pretrain', 'load'):\n"
        " assert isinstance(getattr(petune, n), types.FunctionType), n\n"
        "from petune import attach\nassert isinstance(attach, types.FunctionType)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_petune_imports_nothing_heavy() -> None:
    code = "import petune, sys; print([m for m in ('torch', 'timm', 'peft', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lists_of_names() -> None:
    assert "adaptformer" in {record.name for record in petune.list_tuners()}
    assert {"cifar10", "digits"} <= {record.name for record in petune.list_datasets()}
    assert "vit_nano" in petune.list_backbones("vit_*")
    assert petune.list_backbones("*dinov3*")
    assert petune.list_backbones("no-such-*") == []


def test_pages_import_public_names_only() -> None:
    """Pages for users; docs/api.md says where each name is defined."""
    docs = ROOT.parent / "docs"
    pages = [ROOT.parent / "README.md", *(page for page in docs.rglob("*.md") if page != docs / "api.md")]
    rooms = "|".join(folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").exists())
    inner = re.compile(rf"(?:\bfrom|\bimport|`) ?petune\.(?:{rooms})\.\w+")
    named = {str(page): inner.findall(page.read_text(encoding="utf-8")) for page in pages}
    assert len(named) > 10
    assert {page: names for page, names in named.items() if names} == {}
