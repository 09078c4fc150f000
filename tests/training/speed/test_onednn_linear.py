"""oneDNN's kernel gives torch's bits; a kept heap need not be paged in again."""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor, nn

import petune
from petune.base.malloc import keep_heap
from petune.training.speed import onednn_linear
from petune.training.speed.bf16_weights import store_in_bf16
from petune.training.speed.onednn_linear import use_onednn_linear
from tests.sampling import sampled
from tests.tiny import randomised, tiny
from tests.training.steps import logits_of, same, step

try:
    onednn_linear.linear(torch.ones(2, 8).bfloat16(), torch.ones(8, 8).bfloat16(), None)
except (RuntimeError, AttributeError):  # pragma: no cover
    pytest.skip("this processor, or this torch, has no such kernel", allow_module_level=True)

LAYERS = 8  # of two blocks
with keep_heap(lean=False) as GLIBC:
    """Whether malloc is glibc's and not configured by the user."""


@contextmanager
def _fast(att: petune.Attachment, scale: float = 1) -> Iterator[int]:
    with ExitStack() as stack:
        stack.enter_context(store_in_bf16(att.model, logits_of(att.model)))
        yield stack.enter_context(use_onednn_linear(att.model, logits_of(att.model), scale))


def _attached(method: str, **options: object) -> petune.Attachment:
    torch.manual_seed(1)
    att = randomised(petune.attach(tiny(drop_path_rate=0.2), method, **options))
    att.train()
    return att


def _changed(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, onednn_linear.OnednnLinear)]


METHODS: dict[str, tuple[dict[str, object], int]] = {
    "adaptformer": ({"bottleneck": 4, "dropout": 0.3}, LAYERS), "vpt": ({"num_prompts": 3}, LAYERS),
    "lora": ({"r": 2}, LAYERS), "linear": ({}, LAYERS), "houlsby": ({}, LAYERS), "ssf": ({}, LAYERS),
    "bitfit": ({}, 0), "full": ({}, 0), "partial": ({}, 4),
}  # fmt: skip


@pytest.mark.parametrize("reorder", [True, False])
@pytest.mark.parametrize("method", sampled(METHODS, {"adaptformer", "lora", "partial", "full"}.__contains__))
def test_logits_and_gradients_have_the_same_bits(method: str, reorder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_linear, "should_reorder", lambda layer, rows: reorder)
    options, layers = METHODS[method]
    att = _attached(method, **options)
    plain = step(att, bf16=True)
    with _fast(att) as count:
        assert count == layers
        assert same(step(att, bf16=True), plain)
    assert _changed(att.model) == []
    assert same(step(att, bf16=True), plain)


class Turned(nn.Module):
    """Has inputs that are not contiguous, forward (transposed, sliced) and backward (the gradient of a sum)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(n, 8) for n in (8, 6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).transpose(1, 2))
        out: Tensor = self.fourth(self.third(y[:, 1:])).sum(1) * torch.arange(8.0)
        return out


def test_inputs_that_are_not_contiguous() -> None:
    torch.manual_seed(0)
    model, x = Turned().requires_grad_(False), torch.randn(2, 6, 8, requires_grad=True)

    def turned() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return out.detach(), torch.autograd.grad(out.sum(), x)[0]

    def logits() -> Tensor:
        return turned()[0]

    expected = turned()
    with store_in_bf16(model, logits), use_onednn_linear(model, logits, 1) as count:
        assert count == 4
        assert all(torch.equal(a, b) for a, b in zip(turned(), expected, strict=True))


def test_a_copy_is_kept_of_small_weights_and_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = onednn_linear.should_reorder
    monkeypatch.setattr(onednn_linear, "should_reorder", lambda layer, rows: seen.append(rows) or original(layer, rows))
    with _fast(_attached("adaptformer"), scale=5):
        assert set(seen) == {10 * 17}
    large, small = nn.Linear(1024, 1024), nn.Linear(24, 24)
    assert [original(layer, rows) for layer in (large, small) for rows in (100, 100_000)] == [True, False, True, True]


def _only_of_two_dimensions(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.ndim > 2:
            raise RuntimeError("could not create a primitive descriptor")
        return original(x, weight, bias)

    return forward


@pytest.mark.parametrize("wrong", ["forward", "backward", "with more rows"])
def test_a_kernel_that_fails_or_rounds_differently_is_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, backward = onednn_linear.linear, onednn_linear.Weights.backward
    if wrong == "forward":
        monkeypatch.setattr(onednn_linear, "linear", lambda *args: original(*args) * 1.01)
    elif wrong == "backward":
        monkeypatch.setattr(onednn_linear.Weights, "backward", lambda *args: backward(*args) * 1.01)
    else:
        monkeypatch.setattr(onednn_linear, "linear", _only_of_two_dimensions(original))
    att = _attached("adaptformer")
    plain = step(att, bf16=True)
    with _fast(att) as count:
        assert count == 0
        assert torch.equal(step(att, bf16=True)[0], plain[0])  # type: ignore[arg-type]


def test_without_the_kernel_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> Tensor:
        raise RuntimeError("mkldnn bf16 path needs a cpu with avx512")

    monkeypatch.setattr(onednn_linear, "linear", missing)
    with _fast(_attached("adaptformer")) as count:
        assert count == 0
    monkeypatch.setattr(onednn_linear, "has_kernel", lambda: False)
    with _fast(_attached("adaptformer")) as count:
        assert count == 0


def test_a_replaced_forward_is_kept() -> None:
    att = _attached("adaptformer")
    layer = att.model.blocks[0].mlp.fc1
    own = layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    with _fast(att) as count:
        assert count == LAYERS - 1
        assert layer.forward is own
    assert layer.forward is own


def test_keyword_calls_copies_and_new_weights() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)).to(torch.bfloat16).requires_grad_(False), torch.randn(2, 8)
    layer = model[0]
    with (
        torch.autocast("cpu", torch.bfloat16),
        use_onednn_linear(model, lambda: layer(input=x), 1) as count,
    ):
        assert count == 1
        plain = layer(input=x)
        alone = copy.deepcopy(model)
        layer.load_state_dict({"weight": torch.zeros(8, 8), "bias": torch.zeros(8)})
        assert layer(x).abs().max() == 0
        assert torch.equal(alone(x), plain)
        assert torch.equal(pickle.loads(pickle.dumps(alone))(x), plain)
    assert type(layer) is nn.Linear


def test_copies_are_kept_as_long_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []

    class Noting(onednn_linear.Weights):
        def __init__(self, weight: Tensor, rows: int, reorder: bool) -> None:
            kept.append(reorder)
            super().__init__(weight, rows, reorder)

    monkeypatch.setattr(onednn_linear, "Weights", Noting)
    monkeypatch.setattr(onednn_linear, "memory_for_copies", lambda: 4 * 24 * 24 * (3 + 1 + 4))
    with _fast(_attached("adaptformer")) as count:
        assert count == LAYERS
    assert kept == [True, True, True, *[False] * 5]


def test_layers_are_restored_after_an_error() -> None:
    att = _attached("adaptformer")
    with pytest.raises(KeyError), _fast(att):
        raise KeyError
    assert _changed(att.model) == []


def test_outside_of_autocast_a_layer_raises_as_before() -> None:
    model = nn.Linear(8, 8).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 8)
    with use_onednn_linear(model, lambda: model(x.bfloat16()), 1) as count:
        assert count == 1
        with pytest.raises(RuntimeError, match="same dtype"):
            model(x)


FAULTS = """
import resource, sys, torch
from petune.base.malloc import keep_heap
with keep_heap(lean=sys.argv[1] == "lean") as on:
    for _ in range(20):
        torch.ones(5 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(5 << 20)
    print(on, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not GLIBC, reason="malloc is not glibc's, or set by the user")
@pytest.mark.parametrize(("kind", "low", "high"), [("kept", 0, 5_120), ("lean", 40_000, 10**6)])
def test_a_kept_heap_is_not_paged_in_again_and_a_lean_one_is(kind: str, low: int, high: int) -> None:
    # of 51,200 pages; in a process of its own, since a heap with room is used whatever the thresholds
    done = subprocess.run([sys.executable, "-c", FAULTS, kind], capture_output=True, text=True, check=True)
    on, faults = done.stdout.split()
    assert on == "True"
    assert low <= int(faults) <= high


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_MMAP_THRESHOLD_", "1048576"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")]
)
def test_settings_of_the_user_stay(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with keep_heap(lean=False) as on:
        assert not on


def test_another_libc_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise ValueError("unrecognized configuration name")

    def never(name: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(ctypes, "CDLL", never)
    monkeypatch.setattr(os, "confstr", unknown)
    with keep_heap(lean=False) as on:
        assert not on
