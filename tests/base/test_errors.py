"""The exception tree: exit codes, suggestions, and that the tree in the docstring is the real one."""

from __future__ import annotations

import inspect
import pickle

import pytest

from petune.base import errors
from petune.base.errors import ConfigError, MissingExtra, PetuneError, Problem, UnknownName, did_you_mean

EXIT_CODES = {
    "PetuneError": 1, "ContractViolation": 1, "UsageError": 2, "ConfigError": 2, "UnknownName": 2, "MissingExtra": 3,
    "PluginError": 3,
    "AttachError": 1, "SiteNotFound": 1, "DeadSite": 1, "AlreadyCompiled": 1, "NotMergeable": 2,
    "WeightsUnavailable": 4, "HubError": 4, "ProcessLost": 1, "DataError": 4, "CheckpointError": 4,
    "BackboneMismatch": 4, "ExportError": 1,
    "Diverged": 1,
    "Stopped": 75,
}  # fmt: skip


def _classes() -> dict[str, type[PetuneError]]:
    members = inspect.getmembers(errors, inspect.isclass)
    return {name: cls for name, cls in members if issubclass(cls, PetuneError)}


def test_exit_codes_match_the_design() -> None:
    assert {name: cls.exit_code for name, cls in _classes().items()} == EXIT_CODES


@pytest.mark.parametrize("name", EXIT_CODES)
def test_docstring_tree_shows_every_class_below_its_base(name: str) -> None:
    lines = (errors.__doc__ or "").splitlines()
    column = {word: line.index(word) for line in lines for word in line.split() if word in EXIT_CODES}
    order = list(column)
    base = _classes()[name].__base__
    assert base is not None
    if name != "PetuneError":
        above = [other for other in order[: order.index(name)] if column[other] < column[name]]
        assert above[-1] == base.__name__


def test_similar_names_are_suggested() -> None:
    assert did_you_mean("adaptfomer", ["vpt", "adaptformer"]) == ". Did you mean adaptformer?"
    assert did_you_mean("LoRA", ["vpt", "lora"]) == ". Did you mean lora?"


def test_known_names_are_listed_if_none_is_similar_up_to_twelve() -> None:
    assert did_you_mean("qqqq", ["vpt", "full"]) == ". Known: full, vpt"
    assert did_you_mean("qqqq", [f"n{i:02}" for i in range(13)]).endswith("n11, …")
    assert did_you_mean("qqqq", []) == ""


def test_unknown_name_has_kind_name_suggestions_and_hint() -> None:
    error = UnknownName("dataset", "cifr10", ["cifar10"], "A folder is folder:PATH")
    assert str(error) == "no such dataset: cifr10. Did you mean cifar10? A folder is folder:PATH"
    assert (error.kind, error.name, error.suggestions) == ("dataset", "cifr10", ("cifar10",))
    assert str(UnknownName("dataset", "", ["x"], "Name one")) == "no such dataset: ''. Known: x. Name one"


def test_missing_extra_shows_the_command() -> None:
    assert 'pip install "petune[tensorboard]"' in str(MissingExtra("logging for TensorBoard", "tensorboard"))


def test_every_error_survives_pickling() -> None:
    errors = [
        UnknownName("dataset", "cifr10", ["cifar10"]),
        MissingExtra("logging", "wandb"),
        ConfigError("wrong", [Problem("lr", "lr: required")], cli_hint="Set --lr"),
    ]
    for error in errors:
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
