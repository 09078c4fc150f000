"""The exception tree: exit codes, near names, and that its drawing is the tree."""

from __future__ import annotations

import inspect

import pytest

from petune.base import errors
from petune.base.errors import MissingExtra, PetuneError, UnknownName, near_names

EXIT_CODES = {
    "PetuneError": 1, "UsageError": 2, "ConfigError": 2, "UnknownName": 2, "MissingExtra": 3,
    "PluginError": 3,
    "AttachError": 1, "SiteNotFound": 1, "DeadSite": 1, "AlreadyCompiled": 1, "NotMergeable": 1,
    "WeightsUnavailable": 4, "HubError": 4, "ProcessLost": 1, "DataError": 4, "CheckpointError": 4,
    "BackboneMismatch": 4, "ExportError": 1,
    "Diverged": 1,
    "Stopped": 75,
}  # fmt: skip


def _classes() -> dict[str, type[PetuneError]]:
    found = inspect.getmembers(errors, inspect.isclass)
    return {name: cls for name, cls in found if issubclass(cls, PetuneError)}


def test_exit_codes_are_those_of_the_design() -> None:
    assert {name: cls.exit_code for name, cls in _classes().items()} == EXIT_CODES


@pytest.mark.parametrize("name", EXIT_CODES)
def test_every_class_stands_in_the_drawing_below_its_base(name: str) -> None:
    lines = (errors.__doc__ or "").splitlines()
    depth = {word: line.index(word) for line in lines for word in line.split() if word in EXIT_CODES}
    order = [word for line in lines for word in line.split() if word in EXIT_CODES]
    cls = _classes()[name]
    base = cls.__base__
    assert base is not None
    if cls is not PetuneError:
        above = [other for other in order[: order.index(name)] if depth[other] < depth[name]]
        assert above[-1] == base.__name__


@pytest.mark.parametrize("name", EXIT_CODES)
def test_every_class_says_when_it_is_raised(name: str) -> None:
    assert _classes()[name].__doc__


def test_near_names_are_suggested() -> None:
    assert near_names("adaptfomer", ["vpt", "adaptformer"]) == "; did you mean 'adaptformer'?"


def test_without_a_near_name_the_known_ones_are_listed_up_to_twelve() -> None:
    assert near_names("qqqq", ["vpt", "full"]) == "; known: full, vpt"
    assert near_names("qqqq", [f"n{i:02}" for i in range(13)]).endswith("n11, …")
    assert near_names("qqqq", []) == ""


def test_unknown_name_says_kind_name_and_hint() -> None:
    error = UnknownName("dataset", "cifar", ["cifar10"], "see petune datasets")
    assert str(error) == "no dataset is called 'cifar'; did you mean 'cifar10'? see petune datasets"
    assert (error.kind, error.name) == ("dataset", "cifar")


def test_missing_extra_holds_the_command() -> None:
    assert 'pip install "petune[tensorboard]"' in str(MissingExtra("logging for TensorBoard", "tensorboard"))
