"""Configuration: strictness, YAML round trip, overrides, one message for all problems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, strategies as st
from pydantic import Field, ValidationError

from petune.base.config import Config, UserPath
from petune.base.errors import ConfigError
from petune.base.yaml_values import override, parse_options, parse_value, read_yaml
from petune.training.tasks.classification import ClassificationConfig


class Inner(Config):
    lr: float = 0.1
    epochs: int = 3
    name: str | None = None


class Outer(Config):
    seed: int = 0
    train: Inner = Inner()


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Outer().seed = 1  # type: ignore[misc]


def test_all_problems_are_in_one_message_with_suggestions() -> None:
    with pytest.raises(ConfigError) as caught:
        Outer.build({"sed": 1, "train": {"learning_rate": 1, "epoch": 2, "lr": "fast"}}, "run.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 problems in run.yaml:"
    assert "  - no such key: sed. Did you mean seed?" in lines
    assert "  - no such key: train.epoch. Did you mean train.epochs?" in lines
    problems = {problem.key: problem for problem in caught.value.problems}
    assert problems.keys() == {"sed", "train.learning_rate", "train.epoch", "train.lr"}
    assert {key for key, problem in problems.items() if problem.unknown} == problems.keys() - {"train.lr"}
    assert "(got 'fast')" in problems["train.lr"].message


def test_unknown_key_of_a_nested_configuration_is_suggested_with_its_path() -> None:
    with pytest.raises(ConfigError, match=r"no such key: epoch\. Did you mean train\.epochs\?"):
        Outer.build({"epoch": 3})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="finite"):
        Inner.build({"lr": value})


def test_a_union_is_one_problem() -> None:
    class Other(Config):
        scale: Annotated[float, Field(gt=0)] | Literal["learnable"] | None = None

    with pytest.raises(ConfigError) as caught:
        Other.build({"scale": 0})
    assert str(caught.value) == ("1 problem in Other:\n  - scale: should be greater than 0 or 'learnable' (got 0)")


class Numbers(Config):
    count: int | None = None
    flag: bool = False
    either: bool | int = 0
    off: Literal[False] | float = 1.0
    scale: Annotated[float, Field(gt=0)] | Literal["learnable"] | None = None
    lrs: dict[str, float] = {}
    seeds: tuple[int, ...] = ()
    mean: tuple[float, float] | None = None
    flags: dict[str, bool] = {}


@pytest.mark.parametrize(
    ("key", "value"),
    [("count", True), ("scale", False), ("lrs", {"full": True}), ("seeds", [0, True]), ("mean", (0.5, False))],
)
def test_booleans_are_not_numbers(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{key}[.0-9a-z]*: should be a number"):
        Numbers.build({key: value})


def test_booleans_are_accepted_for_boolean_keys() -> None:
    taken = Numbers(flag=True, either=True, off=False, flags={"a": True}, seeds=(1,), mean=(0.5, 0.5))
    assert (taken.either, taken.off, taken.flags) == (True, False, {"a": True})
    with pytest.raises(ConfigError, match="seeds: should be a valid tuple"):
        Numbers.build({"seeds": True})
    with pytest.raises(ConfigError, match=r"lrs\.float: .*number"):
        Numbers.build({"lrs": {"float": "x"}})


@given(
    seed=st.integers(-(2**40), 2**40),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    name=st.none()
    | st.sampled_from(["\x85", "\u2028", "a: b", "yes", "~"])
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20),
)
def test_yaml_round_trip(seed: int, lr: float, name: str | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = Outer(seed=seed, train=Inner(lr=lr, name=name))
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert Outer.build(read_yaml(file)) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("1e-3", 1e-3), ("0.5", 0.5), ("true", True), ("null", None), ("[1, 2]", [1, 2]),
     ("a b", "a b"), ("[1,", "[1,"), ("", None), ("0", 0), ("0x10", 16), ("010", "010"),
     ("1:30", "1:30"), ("runs/lr #2", "runs/lr #2"), ("#2", "#2"), ("[1, '#2']", [1, "#2"])],
)  # fmt: skip
def test_override_values_are_read_with_their_types(text: str, value: object) -> None:
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


def test_override_sets_nested_keys_in_a_copy() -> None:
    values = {"seed": 1, "train": {"lr": 0.1}}
    assert override(values, ["train.lr=0.5", "train.name=x", "new.key=1"]) == {
        "seed": 1,
        "train": {"lr": 0.5, "name": "x"},
        "new": {"key": 1},
    }
    assert values == {"seed": 1, "train": {"lr": 0.1}}


def test_override_copies_deeper_mappings() -> None:
    values = {"a": {"b": {"c": 1}}}
    assert override(values, ["a.b.c=2"]) == {"a": {"b": {"c": 2}}}
    assert values == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize("assignment", ["seed", "=1", "a..b=1", ".a=1"])
def test_malformed_overrides_are_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match=r"Write it as key\.key=value"):
        override({}, [assignment])


def test_override_through_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed is 1 and has no keys"):
        override({"seed": 1}, ["seed.x=2"])


def test_options_are_parsed() -> None:
    assert parse_options("deep=false, num_prompts=10,") == {"deep": False, "num_prompts": 10}
    assert parse_options("names=[cat, dog],of={a: 1, b: 2},c=3") == {
        "names": ["cat", "dog"],
        "of": {"a": 1, "b": 2},
        "c": 3,
    }
    assert parse_options("a=[1,b=2") == {"a": "[1", "b": 2}
    with pytest.raises(ConfigError, match="not an option: 'deep'"):
        parse_options("deep")
    with pytest.raises(ConfigError, match="the option r is given twice"):
        parse_options("r=4, r =16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n", "Write a mapping"),
        ("a: [", "not valid YAML"),
        ("a: 1\nb: {c: 1, d: 2, c: 3}", r"in line 2: the key c is there twice"),
        ("train: {}\nseed: 1\ntrain: {}", r"in line 3: the key train is there twice"),
        ("!!python/object:os.system x", "not valid YAML"),
    ],
)
def test_yaml_other_than_a_plain_mapping_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(file)


def test_a_merge_key_fills_in_what_a_mapping_leaves_open(tmp_path: Path) -> None:
    # PyYAML 6.0.4 took y from a
    (tmp_path / "c.yaml").write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: *b, x: 4}\n")
    assert read_yaml(tmp_path / "c.yaml")["c"] == {"x": 4, "y": 3}


def test_a_missing_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config file .*nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["1: x", "on: x", "train: {1: 2}", "a: [{null: 1}]"])
def test_keys_that_yaml_does_not_read_as_text_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"YAML reads a key of .*a\.yaml as (1|True|None)\."):
        read_yaml(tmp_path / "a.yaml")


def test_an_impossible_date_is_not_valid_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("output: 2026-13-45")
    with pytest.raises(ConfigError, match="is not valid YAML: month must be in"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["2026-13-45", "2026-11-26", "2026-11-26 10:00:00", "0x_", "[" * 5000])
def test_dates_and_unreadable_values_are_text(text: str) -> None:
    assert parse_value(text) == text


class Placed(Config):
    output: UserPath | None = None


def test_paths_expand_home_and_must_be_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert Placed(output="~/x").output == Path("/home/me/x")  # type: ignore[arg-type]
    assert Placed(output="~nobody-here/x").output == Path("~nobody-here/x")  # type: ignore[arg-type]
    assert Placed().output is None
    with pytest.raises(ConfigError, match="output: the path is not UTF-8"):
        Placed(output=Path("o\udcff"))


def test_of_a_table_only_the_wrong_entry_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        ClassificationConfig.build({"class_weights": {"cat": -3, 0: 1}}, "the options")
    assert [problem.key for problem in caught.value.problems] == ["class_weights.cat"]
    assert ClassificationConfig.build({"class_weights": {0: 2}}, "the options").class_weights == {"0": 2}
