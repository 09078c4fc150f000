"""Checkpoints: exact to the bit, finite, and read from the newest valid one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from petune.base.errors import CheckpointError, ConfigError
from petune.base.files import verify_directory, write_directory
from petune.training.checkpoint import Checkpoint, check_optimizer, newest_checkpoint, save_checkpoint
from petune.training.config import TrainConfig
from petune.training.optim import create_optimizer


def _checkpoint(step: int, value: float = 1.0) -> Checkpoint:
    return Checkpoint({"w": torch.full((2, 3), value)}, {}, {"state": {}, "param_groups": []}, {"step": step})


def _newest(directory: Path) -> Checkpoint:
    checkpoint, problems = newest_checkpoint(directory)
    assert problems == []
    assert checkpoint is not None
    return checkpoint


def _trained(name: str) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameters = {"w": nn.Parameter(torch.randn(8, 6)), "b": nn.Parameter(torch.randn(8))}
    optimizer = create_optimizer(parameters, set(), TrainConfig(lr=1e-2, weight_decay=0.1, optimizer=name))
    _train(parameters, optimizer, 3)
    return parameters, optimizer


def _train(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "sgd", "nadamw", "lion", "lamb", "nmuon"])
def test_a_restored_optimizer_continues_bit_for_bit(name: str, tmp_path: Path) -> None:
    parameters, optimizer = _trained(name)
    save_checkpoint(tmp_path, Checkpoint(parameters, {}, optimizer.state_dict(), {"step": 3}))
    newest = _newest(tmp_path)
    copies, fresh = _trained(name)
    for key, copy in copies.items():
        copy.data.copy_(newest.tensors[key])
    fresh.load_state_dict(newest.optimizer)
    _train(parameters, optimizer, 4)
    _train(copies, fresh, 4)
    assert all(torch.equal(parameters[key], copies[key]) for key in parameters)


def test_tensors_of_every_kind_are_restored_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    tensors: dict[str, Tensor] = {
        "a": shared, "the same": shared, "a view": shared[:, ::2], "transposed": shared.T,
        "scalar": torch.tensor(0.1), "double": torch.randn(3, dtype=torch.float64),
        "half": torch.randn(3).half(), "empty": torch.empty(0, 3),
        "buffer:count": torch.tensor(7), "buffer:mask": torch.tensor([True, False]),
        "denormal": torch.tensor([1e-42, -0.0]),
    }  # fmt: skip
    save_checkpoint(tmp_path, Checkpoint(tensors, {"b": shared}, {"state": {}, "param_groups": []}, {"step": 1}))
    newest = _newest(tmp_path)
    assert set(newest.tensors) == set(tensors)
    for key, tensor in tensors.items():
        read = newest.tensors[key]
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read, tensor)
    assert torch.signbit(newest.tensors["denormal"])[1]
    assert torch.equal(newest.best["b"], shared)


def test_progress_is_restored_bit_for_bit(tmp_path: Path) -> None:
    progress = {"step": 1, "loss_sum": 0.1 + 0.2, "epochs": [{"train_loss": 1 / 3}]}
    save_checkpoint(tmp_path, Checkpoint({}, {}, {"state": {}, "param_groups": []}, progress))
    assert _newest(tmp_path).progress == progress


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_tensors_are_not_saved_and_the_last_checkpoint_stays(value: float, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, _checkpoint(1))
    with pytest.raises(CheckpointError, match="w contains NaN"):
        save_checkpoint(tmp_path, _checkpoint(2, value))
    state = {"state": {0: {"momentum": torch.tensor([value])}}, "param_groups": []}
    with pytest.raises(CheckpointError, match=r"state\.0\.momentum contains NaN"):
        save_checkpoint(tmp_path, Checkpoint({}, {}, state, {"step": 2}))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]
    assert _newest(tmp_path).progress["step"] == 1


def test_a_buffer_may_contain_infinity_but_not_nan(tmp_path: Path) -> None:
    mask = {"buffer:attn_mask": torch.tensor([0.0, float("-inf")])}
    save_checkpoint(tmp_path, Checkpoint(mask, {}, {"state": {}, "param_groups": []}, {"step": 1}))
    assert torch.equal(_newest(tmp_path).tensors["buffer:attn_mask"], mask["buffer:attn_mask"])
    broken = {"buffer:running_mean": torch.tensor([float("nan")])}
    with pytest.raises(CheckpointError, match="running_mean contains NaN"):
        save_checkpoint(tmp_path, Checkpoint(broken, {}, {"state": {}, "param_groups": []}, {"step": 2}))


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 12, 1000):
        save_checkpoint(tmp_path, _checkpoint(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000012", "step-000001000"]
    assert _newest(tmp_path).progress["step"] == 1000


def test_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize("file", ["model.safetensors", "best.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(file: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, _checkpoint(1, 1.0))
    newest = save_checkpoint(tmp_path, _checkpoint(2, 2.0))
    content = bytearray((newest / file).read_bytes())
    content[-1] ^= 1
    (newest / file).write_bytes(content)
    found, problems = newest_checkpoint(tmp_path)
    assert found is not None
    assert torch.equal(found.tensors["w"], torch.ones(2, 3))
    assert len(problems) == 1
    assert f"{newest / file} is damaged" in problems[0]


def test_an_incomplete_checkpoint_is_skipped(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, _checkpoint(1))
    newest = save_checkpoint(tmp_path, _checkpoint(2))
    os.unlink(newest / "manifest.json")
    found, problems = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.progress["step"] == 1
    assert "manifest.json" in problems[0]


def test_a_checkpoint_of_a_newer_petune_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, _checkpoint(1))
    newest = save_checkpoint(tmp_path, _checkpoint(2))
    files = {p.name: p.read_bytes() for p in newest.iterdir() if p.name != "manifest.json"}
    state = json.loads(files["state.json"]) | {"format": 99}
    write_directory(newest, {**files, "state.json": json.dumps(state).encode()})
    verify_directory(newest)
    with pytest.raises(CheckpointError, match=r"format 99, .* newer petune"):
        newest_checkpoint(tmp_path)


def test_an_optimizer_state_that_cannot_be_saved_is_an_error(tmp_path: Path) -> None:
    state = {"state": {0: {"factors": [torch.ones(2)]}}, "param_groups": []}
    with pytest.raises(CheckpointError, match="optimizer's state"):
        save_checkpoint(tmp_path, Checkpoint({}, {}, state, {"step": 1}))
    assert list(tmp_path.iterdir()) == []


def test_saving_removes_damaged_checkpoints_of_later_steps(tmp_path: Path) -> None:
    for step in (1, 4, 8):
        save_checkpoint(tmp_path, _checkpoint(step))
    for step in (4, 8):
        (tmp_path / f"step-{step:09}" / "model.safetensors").write_bytes(b"damaged")
    assert newest_checkpoint(tmp_path)[0] is None
    save_checkpoint(tmp_path, _checkpoint(3, value=5.0))
    assert float(_newest(tmp_path).tensors["w"][0, 0]) == 5.0
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000003"]


@pytest.mark.parametrize("name", ["adafactorbv", "adahessian"])
def test_an_unsupported_optimizer_is_refused_before_training(name: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer {name} is not supported"):
        check_optimizer(TrainConfig(lr=1e-3, weight_decay=0.0, optimizer=name))


@pytest.mark.parametrize("name", ["adamw", "sgd", "nmuon", "lamb", "lion"])
def test_checking_an_optimizer_keeps_the_random_state(name: str) -> None:
    before = torch.get_rng_state()
    check_optimizer(TrainConfig(lr=1e-3, weight_decay=0.0, optimizer=name))
    assert torch.equal(torch.get_rng_state(), before)
