"""Values that were merged stay, whatever other attachments that train the same tensors do afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import petune
from tests.tiny import randomised, tiny

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
AFTER: dict[str, Callable[[petune.Attachment, Path], object]] = {
    "enable and disable": lambda att, _: (att.enable(), att.disable()),
    "save": lambda att, path: att.save(path / "a"),
    "detach": lambda att, _: att.detach(),
}


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    out: Tensor = model.eval()(X)
    return out


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("merged_first", [False, True])
def test_merged_values_stay(after: str, enabled: bool, merged_first: bool, tmp_path: Path) -> None:
    model = tiny()
    methods = ["bitfit", "linear"] if merged_first else ["linear", "bitfit"]
    attached = [randomised(petune.attach(model, method)) for method in methods]
    merged, other = attached if merged_first else attached[::-1]
    other.disable()
    with_merged = logits(model)
    if enabled and not merged_first:
        other.enable()  # the later one still decides
    merged.merge()
    assert torch.equal(logits(model), with_merged)
    AFTER[after](other, tmp_path)
    assert torch.equal(logits(model), with_merged)


def test_an_earlier_attachment_goes_on_from_what_was_merged(tmp_path: Path) -> None:
    model = tiny()
    first, second, third = (randomised(petune.attach(model, "linear", name=name)) for name in "abc")
    second.disable()
    with torch.no_grad():
        model.head.weight += 1
    third.merge()
    merged = model.head.weight.detach().clone()
    first.save(tmp_path / "a")
    assert torch.equal(first.state()["head.weight"], merged)
    second.enable()
    assert not torch.equal(model.head.weight, merged)
    second.detach()
    first.detach()
    assert torch.equal(model.head.weight, merged)
