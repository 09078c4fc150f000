"""Micro-batches: the same step in pieces, and the largest piece that fits, found once and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petune.base.errors import ConfigError
from petune.training import loop
from petune.training.events import Event, Note
from petune.training.fit_batch import largest_that_fits

Make = Callable[..., Any]


def losses(directory: Path) -> list[float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def without_noise(attachment: Any) -> Any:
    attachment.model.body[2] = nn.Identity()  # BatchNorm sees micro-batches, and dropout draws in another order
    attachment.model.body[3] = nn.Identity()
    attachment.__post_init__()
    return attachment


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_micro_batches_give_the_same_step(
    size: int, mixup: float, tmp_path: Path, make_trainer: Make, toy: Make
) -> None:
    for name, option in (("whole", {}), ("pieces", {"micro_batch_size": size})):
        trainer = make_trainer(without_noise(toy()), directory=tmp_path / name, mixup=mixup, log_every=1, **option)
        trainer.fit()
    whole, pieces = losses(tmp_path / "whole"), losses(tmp_path / "pieces")
    assert len(whole) == 10
    assert pieces == pytest.approx(whole, rel=1e-4)


def test_the_adapters_own_loss_is_that_of_the_whole_batch(tmp_path: Path, make_trainer: Make, toy: Make) -> None:
    for name, option in (("plain", {}), ("whole", {}), ("pieces", {"micro_batch_size": 2})):
        attachment = without_noise(toy())
        if name != "plain":
            kept: list[torch.Tensor] = []
            attachment.model.head.register_forward_hook(lambda m, args, y, kept=kept: kept.append(y.square().mean()))
            attachment.aux_loss = kept.pop  # of the last forward
        make_trainer(attachment, directory=tmp_path / name, log_every=1, **option).fit()
    plain, whole, pieces = (losses(tmp_path / name) for name in ("plain", "whole", "pieces"))
    assert pieces == pytest.approx(whole, rel=1e-4)
    assert all(b > a + 1e-3 for a, b in zip(plain[:2], whole[:2], strict=True))


class Hungry(nn.Module):
    """Runs out of memory above two images, as a GPU does."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2 and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return x


def test_the_largest_micro_batch_is_found_without_a_trace(
    tmp_path: Path, make_trainer: Make, toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "can_run_out", lambda device: True)
    attachment = toy()
    attachment.model.body.insert(0, Hungry())
    attachment.__post_init__()
    state = {key: t.clone() for key, t in attachment.model.state_dict().items()}
    trainer = make_trainer(attachment, batch_size=4)
    assert trainer.largest_micro_batch() == 2
    assert all(torch.equal(t, state[key]) for key, t in attachment.model.state_dict().items())
    assert all(p.grad is None for p in trainer.params.values())


def test_a_resume_keeps_the_micro_batch(
    tmp_path: Path, make_trainer: Make, toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    monkeypatch.setattr(loop, "can_run_out", lambda device: True)
    monkeypatch.setattr(loop, "largest_that_fits", lambda step, batch_size, parameters: 2)
    first = make_trainer(without_noise(toy()), on_event=events.append, epochs=1)
    assert first.fit().micro_batch_size == 2
    assert [e.text for e in events if isinstance(e, Note)] == ["each step runs 6 images through the model 2 at a time"]
    monkeypatch.setattr(loop, "largest_that_fits", lambda step, batch_size, parameters: 1)
    again = make_trainer(without_noise(toy()), epochs=1)
    assert again.fit().micro_batch_size == 2


def test_a_single_image_that_does_not_fit_is_an_error() -> None:
    sizes: list[int] = []

    def step(size: int) -> None:
        sizes.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    with pytest.raises(ConfigError, match=r"not even one image fits \(CUDA out of memory\.\)"):
        largest_that_fits(step, 12, [])
    assert sizes == [12, 6, 3, 1]


def test_micro_batches_have_nearly_equal_sizes(make_trainer: Make, toy: Make) -> None:
    attachment, seen = toy(), list[int]()
    attachment.model.body[2].register_forward_pre_hook(
        lambda m, args: seen.append(len(args[0])) if m.training else None
    )
    make_trainer(attachment, batch_size=9, micro_batch_size=4, epochs=1).fit()  # 4, 4 and 1 are none for BatchNorm
    assert set(seen) == {3, 4}  # of batches of 9 and 8


def test_a_configured_micro_batch_is_not_searched(
    make_trainer: Make, toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "can_run_out", lambda device: True)
    monkeypatch.setattr(loop, "largest_that_fits", lambda step, batch_size, parameters: pytest.fail("probed"))
    assert make_trainer(toy(), epochs=1, micro_batch_size=3).fit().micro_batch_size == 3
