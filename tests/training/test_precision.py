"""Devices and number formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from petune.base.errors import ConfigError
from petune.training import precision
from petune.training.events import Event, Note
from petune.training.precision import choose_device, choose_precision

Make = Callable[..., Any]


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "meta:x"])
def test_a_missing_device_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="no such device"):
        choose_device(name)


def test_devices_are_chosen_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    mps = torch.backends.mps.is_available()
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")


@pytest.mark.parametrize(("speedup", "chosen"), [(0.003, "fp32"), (1.2, "fp32"), (1.5, "bf16"), (8.0, "bf16")])
def test_auto_takes_bfloat16_only_if_it_is_faster(speedup: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_speedup_on_cpu", lambda: speedup)
    assert choose_precision("auto", torch.device("cpu")) == chosen


def test_the_measurement_keeps_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        precision.bf16_speedup_on_cpu.__wrapped__()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_an_explicit_precision_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_speedup_on_cpu", lambda: pytest.fail("measured"))
    assert choose_precision("fp32", torch.device("cpu")) == "fp32"
    assert choose_precision("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.parametrize(
    ("wanted", "speedup", "warning"),
    [
        ("bf16", 0.02, "takes 50 times as long"),
        ("bf16", 0.9, ""),
        ("bf16", 8.0, ""),
        ("fp32", 0.02, ""),
        ("auto", 8.0, "bfloat16 is faster"),
        ("auto", 1.0, ""),
    ],
)
def test_a_note_names_the_format_that_auto_took_and_warns_of_a_slow_one(
    wanted: str, speedup: float, warning: str, make_trainer: Make, toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bf16_speedup_on_cpu", lambda: speedup)
    notes: list[str] = []

    def watch(event: Event) -> None:
        notes.extend([event.text] if isinstance(event, Note) else [])

    make_trainer(toy(0), precision=wanted, on_event=watch).fit()
    assert [warning in note for note in notes] == ([True] if warning else [])


def test_tf32_on_a_cpu_is_an_error() -> None:
    with pytest.raises(ConfigError, match="tf32 needs an NVIDIA GPU"):
        choose_precision("tf32", torch.device("cpu"))


def test_choosing_a_precision_does_not_set_that_of_the_process() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert choose_precision("fp32", torch.device("cuda")) == "fp32"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
