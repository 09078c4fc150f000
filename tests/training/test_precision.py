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
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "meta:x"])
def test_a_missing_device_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="no such device"):
        choose_device(name)


def test_devices_are_chosen_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    mps = torch.backends.mps.is_available()
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")


@pytest.mark.parametrize(
    ("machine", "avx512", "amx", "chosen"),
    [
        ("x86_64", False, False, "fp32"),
        ("x86_64", True, False, "bf16"),
        ("AMD64", False, True, "bf16"),
        ("x86_64", None, None, "fp32"),  # a PyTorch that cannot tell
        ("aarch64", True, True, "fp32"),
    ],
)
def test_auto_takes_bfloat16_where_the_processor_has_instructions_for_it(
    machine: str, avx512: bool | None, amx: bool | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    for name, has in (("_is_avx512_bf16_supported", avx512), ("_is_amx_tile_supported", amx)):
        if has is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda has=has: has, raising=False)
    if machine == "aarch64":
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert choose_precision("auto", CPU) == chosen
    assert choose_precision("fp32", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"


def test_auto_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of one comparison took different formats on a busy machine."""
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("timed"))
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: pytest.fail("multiplied"))
    assert choose_precision("auto", CPU) in {"fp32", "bf16"}


@pytest.mark.parametrize(
    ("recorded", "has_bf16", "used"),
    [
        ("fp32", True, "fp32"),
        ("bf16", True, "bf16"),
        ("bf16", False, "fp32"),
        ("tf32", True, "fp32"),
        (None, True, "bf16"),
    ],
)
def test_the_format_of_a_run_is_used_where_the_device_has_it(
    recorded: str | None, has_bf16: bool, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: has_bf16)
    assert precision.precision_of_run(recorded, CPU) == used


@pytest.mark.parametrize(
    ("wanted", "has_bf16", "warning"),
    [
        ("bf16", False, "bfloat16 is slow on this processor"),
        ("bf16", True, ""),
        ("fp32", False, ""),
        ("auto", True, "auto: bfloat16"),
        ("auto", False, "auto: float32"),
    ],
)
def test_a_note_names_the_format_that_auto_took_and_warns_of_a_slow_one(
    wanted: str, has_bf16: bool, warning: str, make_trainer: Make, toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: has_bf16)
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
