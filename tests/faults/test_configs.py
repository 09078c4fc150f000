"""Configurations with many things wrong at once: one message, a line for each, near names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, seed, settings, strategies as st

import petune
from petune.base.config import Config
from petune.base.errors import ConfigError, PetuneError
from petune.runner.compare_config import CompareConfig
from petune.runner.pretrain import PretrainConfig
from petune.runner.run_config import RunConfig
from tests.faults.conftest import tally, tries
from tests.faults.test_nonsense import CONFIGS, keys, nested


def leaves(schema: dict[str, Any], defs: dict[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key of a configuration, dotted, with its JSON schema."""
    for name, part in schema["properties"].items():
        below = defs.get(part.get("$ref", "").rpartition("/")[2])
        if below is not None and "properties" in below:
            yield from leaves(below, defs, f"{above}{name}.")
        else:
            yield above + name, below or part


def wrong_values(schema: dict[str, Any]) -> list[object]:
    """Values of another type, beyond a limit, or not among the choices."""
    kinds = [schema, *schema.get("anyOf", [])]
    by_type = {"integer": "many", "number": "fast", "string": 5, "boolean": "perhaps", "array": 3, "object": 3}
    values: list[object] = [by_type[str(k["type"])] for k in kinds if k.get("type") in by_type][:1]
    for kind in kinds:
        values += [kind["minimum"] - 1] if "minimum" in kind else []
        values += [kind["maximum"] + 1] if "maximum" in kind else []
        values += [kind["exclusiveMinimum"]] if "exclusiveMinimum" in kind else []
        values += [kind["exclusiveMaximum"]] if "exclusiveMaximum" in kind else []
        values += ["wat"] if "enum" in kind else []
        values += [float("nan"), float("inf")] if kind.get("type") == "number" else []
        values += [1.5] if kind.get("type") == "integer" else []
    return values


def merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Both mappings, those below their keys merged too."""
    both = {k: merged(a[k], b[k]) for k in a.keys() & b.keys() if isinstance(a[k], dict) and isinstance(b[k], dict)}
    return {**a, **b, **both}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("made", ["build", "called"])
def test_any_number_of_problems_is_one_message(made: str, config: type[Config]) -> None:
    whole = config.model_json_schema()
    schemas = dict(leaves(whole, whole.get("$defs", {})))
    assert {*schemas} == {*keys(config)}
    tried = [0]

    @settings(max_examples=tries(20, 1000), deadline=None, database=None)
    @seed(4)
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        chosen = data.draw(st.sets(st.sampled_from(sorted(schemas)), max_size=6))
        typos = data.draw(st.sets(st.sampled_from(sorted(schemas)), min_size=0 if chosen else 1, max_size=3))
        values: dict[str, Any] = {"methods": ["linear"]} if config is CompareConfig else {}
        for key in sorted(chosen):
            values = merged(values, nested(key, data.draw(st.sampled_from(wrong_values(schemas[key])), label=key)))
        for key in sorted(typos):
            values = merged(values, nested(key + "x", 1))
        with pytest.raises(ConfigError) as caught:
            config.build(values) if made == "build" else config(**values)
        head, *lines = str(caught.value).splitlines()
        count = len(chosen) + len(typos)
        assert head == f"{count} problem{'s' if count > 1 else ''} in {config.__name__}:"
        problems = {problem.key: problem for problem in caught.value.problems}
        assert lines == [f"  - {problem.message}" for problem in problems.values()]
        assert {*problems} == chosen | {key + "x" for key in typos}
        assert {key for key, problem in problems.items() if problem.unknown} == {key + "x" for key in typos}
        assert all(re.search(rf"Did you mean .*\b{key}\b", problems[key + "x"].message) for key in typos)
        tried[0] += 1

    each()
    what = f"{config.__name__} with wrong keys, types and ranges at once"
    tally(f"{what}, {made}", "one message, one line per problem, similar names suggested", tried[0], tried[0])


COMBINATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "mixing needs pairs": ({"train": {"mixup": 0.4, "batch_size": 15}}, "even"),
    "more shots than images": ({"shots": 5000}, "5000"),
    "an image smaller than a patch": ({"image_size": 8, "patch_size": 16}, "patch_size: "),
    "a rate for a method that is not compared": ({"methods": ["linear"], "lrs": {"liner": 1}}, "Did you mean linear"),
    "that, beside a wrong key": ({"methods": ["linear"], "lrs": {"liner": 1}, "sed": 1}, r"2 problems(.|\n)*sed"),
    "one of the rates is none": ({"methods": ["linear"], "lrs": {"linear": 0}}, "lrs.linear"),
    "options of another method": ({"method": "vpt:bottleneck=3"}, "no such key: bottleneck"),
    "a value of an option": ({"method": "adaptformer:bottleneck=none"}, "bottleneck"),
    "weights of another width": ({"weights": "cifar100", "backbone_options": {"embed_dim": 48}}, "cifar100"),
    "an option that the backbone does not have": ({"backbone_options": {"wat": 1}}, "wat"),
    "a config beside its keys": ({"config": RunConfig(), "seed": 1}, "not both. Drop seed"),
    "a config of something else": ({"config": CompareConfig(methods=("linear",))}, "not a RunConfig"),
}


@pytest.mark.parametrize("what", COMBINATIONS)
def test_combinations(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values, message = COMBINATIONS[what]
    small: dict[str, Any] = {"backbone": "vit_nano", "weights": "none", "dataset": "digits", "device": "cpu"}
    call = petune.compare if "methods" in values else petune.run
    with pytest.raises(PetuneError, match=message) as caught:
        call(**(values if {"config", "methods"} & values.keys() else {**small, **values}))
    assert caught.value.exit_code in (1, 2, 4)


def test_a_config_is_never_pydantics_error() -> None:
    for config in (*CONFIGS, petune.TunerConfig):
        with pytest.raises(ConfigError, match="no such key: wat"):
            config(wat=1)
        with pytest.raises(ConfigError, match="not a mapping"):
            config.build([("wat", 1)])  # type: ignore[arg-type]
    assert PretrainConfig.from_call(None, {"seed": 3}, "x").seed == 3
