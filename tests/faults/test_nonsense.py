"""Nonsense for the commands and for every key of a configuration: one clear error each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from petune.base.config import Config
from petune.base.errors import ConfigError
from petune.cli.main import main
from petune.runner.compare_config import CompareConfig
from petune.runner.pretrain import PretrainConfig
from petune.runner.run_config import RunConfig

CONFIGS: tuple[type[Config], ...] = (RunConfig, PretrainConfig, CompareConfig)
NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def keys(config: type[Config], above: str = "") -> Iterator[str]:
    """Every key of a configuration, dotted."""
    for name, field in config.model_fields.items():
        kind = field.annotation
        if inspect.isclass(kind) and issubclass(kind, Config):
            yield from keys(kind, f"{above}{name}.")
        else:
            yield above + name


def nested(key: str, value: object) -> dict[str, object]:
    head, dot, tail = key.partition(".")
    return {head: nested(tail, value) if dot else value}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_value_is_taken_whole_or_refused_by_its_key(config: type[Config], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(keys(config))))
    value = data.draw(NONSENSE)
    base: dict[str, Any] = {"methods": ["linear"]} if config is CompareConfig else {}
    try:
        built = config.build({**base, **nested(key, value)}, "nonsense.yaml")
    except ConfigError as error:
        message = str(error)
    else:
        message = key
        assert config.build(yaml.safe_load(built.to_yaml()), "again") == built
    assert key.rpartition(".")[2] in message


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_all_wrong_keys_are_in_one_message(config: type[Config]) -> None:
    wrong = {key + "x": 1 for key in keys(config) if "." not in key}
    with pytest.raises(ConfigError) as caught:
        config.build(wrong, "nonsense.yaml")
    for key in wrong:
        assert f"no such key: {key}" in str(caught.value)


COMMANDS: dict[tuple[str, ...], int] = {
    ("run", "--method", ""): 2,
    ("run", "--backbone", "../../etc/passwd", "--dataset", "digits"): 2,
    ("run", "--dataset", "folder:"): 2,
    ("run", "--dataset", "cifar1000", "--backbone", "vit_nano"): 2,
    ("run", "--epochs", "0"): 2,
    ("run", "--epochs", "many"): 2,
    ("run", "--lr", "nan"): 2,
    ("run", "--lr", "-1"): 2,
    ("run", "--batch-size", "1e9"): 2,
    ("run", "--device", "abacus", "--backbone", "vit_nano", "--dataset", "digits"): 2,
    ("run", "--weights", "/nowhere", "--backbone", "vit_nano", "--dataset", "digits"): 4,
    ("run", "--config", "/nowhere.yaml"): 2,
    ("run", "--set", "a"): 2,
    ("run", "--set", "train.lr=[1]"): 2,
    ("run", "--method", "vpt:deep=maybe", "--backbone", "vit_nano", "--dataset", "digits"): 2,
    ("run", "extra"): 2,
    ("compare",): 2,
    ("compare", "linear", "linear"): 2,
    ("compare", "linear", "--seeds", "0,0"): 2,
    ("compare", "linear", "--seeds", "zero"): 2,
    ("pretrain", "--backbone", "vit_nan"): 2,
    ("inspect", "--backbone", "resnet9000"): 2,
    ("inspect", "--method", "nothing", "--backbone", "vit_nano"): 2,
    ("backbones", "zzz*"): 0,
    ("methods", "extra"): 2,
    ("datasets", "extra"): 2,
    ("data", "check", "/nowhere"): 4,
    ("data",): 2,
    ("env", "--wat"): 2,
    ("nothing",): 2,
}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PETUNE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    _, err = capfd.readouterr()
    assert stopped.value.code == COMMANDS[words], err
    assert "Traceback" not in err
    assert "a bug in petune" not in err
    assert not list(tmp_path.glob("runs/*"))
