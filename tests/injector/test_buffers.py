"""Buffers of adapters, such as BatchNorm statistics, masks and what a forward makes, are saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import petune
from petune.adapters.format import read_adapter
from petune.injector.load import attach_saved
from tests.tiny import X, tiny, trained as train


class Normalized(nn.Module):
    """A projection with every kind of buffer: statistics, a random mask, one that the first forward makes, a cache."""

    lazy: Tensor | None
    cache: Tensor

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.BatchNorm1d(dim)
        self.register_buffer("mask", (torch.rand(dim) > 0.5).float())
        self.register_buffer("lazy", None)
        self.register_buffer("cache", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.lazy is None:
            self.lazy = torch.rand(x.shape[-1])
        flat = self.linear(x * self.cache).flatten(0, -2)
        change: Tensor = self.norm(flat).reshape(x.shape) * self.mask * self.lazy
        return x + change


class FromTwo(Normalized):
    """The same, from two sites."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        return super().forward(xs[0] + xs[1])


class NormalizedPrompts(Normalized):
    """Prompts that are made by it."""

    num_prompts = 2

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(1, 2, 24))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.prompts)


VERBS: dict[str, Callable[[petune.Edit, petune.Block, petune.Block], None]] = {
    "parallel": lambda edit, first, last: edit.parallel(last.mlp, last.mlp, Normalized()),
    "parallel of several sites": lambda edit, first, last: edit.parallel([first, last], last, FromTwo()),
    "before": lambda edit, first, last: edit.before(last.attn, Normalized()),
    "after": lambda edit, first, last: edit.after(last.attn, Normalized()),
    "prompt": lambda edit, first, last: edit.prompt(last, NormalizedPrompts()),
}


class WithBuffers(petune.Tuner[petune.TunerConfig]):
    """An adapter with buffers, by one verb."""

    identity_at_init = False

    def __init__(self, verb: str) -> None:
        super().__init__()
        self.verb = verb

    def attach(self, edit: petune.Edit) -> None:
        blocks = edit.sites.require_blocks()
        VERBS[self.verb](edit, blocks[0], blocks[-1])


def trained(verb: str, seed: int = 1) -> petune.Attachment:
    torch.manual_seed(seed)
    att = petune.attach(tiny(), WithBuffers(verb), name="own")
    return train(att)


@pytest.mark.parametrize("verb", VERBS)
def test_the_buffers_of_an_adapter_are_saved(verb: str, tmp_path: Path) -> None:
    att = trained(verb)
    att.save(tmp_path / "a")
    in_file = {key.rpartition(".")[2] for key in load_file(tmp_path / "a" / "adapter_model.safetensors")}
    assert {"running_mean", "running_var", "num_batches_tracked", "mask", "lazy"} <= in_file
    assert "cache" not in in_file
    torch.manual_seed(7)  # another mask
    fresh = tiny()
    again = petune.load(fresh, tmp_path / "a", tuner=WithBuffers(verb))
    assert torch.equal(fresh(X), att.model(X))
    again.disable()
    again.enable()
    assert torch.equal(copy.deepcopy(fresh)(X), att.model(X))
    again.detach()
    assert list(fresh.state_dict()) == list(tiny().state_dict())


@pytest.mark.parametrize("method", ["partial", "full"])
def test_a_method_that_trains_modules_as_a_whole_saves_no_buffers_of_others(method: str, tmp_path: Path) -> None:
    model = tiny().eval()
    other = petune.attach(model, "peft:vera")
    fingerprint = other.fingerprint()
    model.double().float()  # replaces all buffers
    assert other.fingerprint() == fingerprint
    att = petune.attach(model, method)
    assert not [key for key in att.state() if "vera" in key]
    other.disable()
    att.save(tmp_path / "a")
    fresh = tiny().eval()
    petune.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(X), model(X))


def test_a_file_without_them_loads_with_a_warning_if_nothing_depends_on_them(tmp_path: Path) -> None:
    """Development versions did not save them."""
    att = trained("after")
    with torch.no_grad():
        for key, p in att.tuned.items():
            p.zero_() if "norm" in key else None
    att.save(tmp_path / "a")
    saved = read_adapter(tmp_path / "a")
    parameters = {key: t for key, t in saved.tensors.items() if key.rpartition(".")[2] in {"weight", "bias"}}
    with pytest.warns(UserWarning, match="without the buffers of its adapters"):
        again = attach_saved(tiny(), replace(saved, tensors=parameters), tuner=WithBuffers("after"))
    assert torch.equal(again.model(X), att.model(X))
