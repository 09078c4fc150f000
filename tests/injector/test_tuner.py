"""Tuner: the config class is named once, in the brackets of the base class."""

from __future__ import annotations

from typing import TypeVar

import pytest

import petune
from petune.base.errors import ConfigError


class WidthConfig(petune.TunerConfig):
    width: int = 3


class WiderConfig(WidthConfig):
    width: int = 5


ConfigT = TypeVar("ConfigT", bound=WidthConfig)


class Width(petune.Tuner[WidthConfig]):
    pass


class Family(petune.Tuner[ConfigT]):
    pass


class Member(Family[WiderConfig]):
    pass


class Child(Width):
    pass


@pytest.mark.parametrize(
    ("tuner", "config"), [(Width, WidthConfig), (Member, WiderConfig), (Child, WidthConfig)], ids=lambda c: c.__name__
)
def test_config_comes_from_the_base_class(tuner: type[Width], config: type[WidthConfig]) -> None:
    assert tuner.Config is config
    assert tuner().config == config()
    with pytest.raises(ConfigError, match="width"):
        tuner(width="wide")


def test_a_tuner_without_a_config_class_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Bare names no config class. Write class Bare\(petune.Tuner\[MyConfig\]\)"):

        class Bare(petune.Tuner):  # type: ignore[type-arg]
            pass
