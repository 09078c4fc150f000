"""A run that was stopped, killed or damaged and then resumed equals the uninterrupted one to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from petune.base.errors import CheckpointError, Stopped
from petune.base.files import MANIFEST, write_manifest
from petune.data.batches import AUGMENT_FORMAT
from petune.training import precision, save_schedule
from petune.training.events import EpochEnded, Event, Note, StepDone
from petune.training.stop import StopFlag
from tests.sampling import sampled

Make = Callable[..., Any]
METHODS: dict[str, dict[str, Any]] = {
    "adaptformer": {"bottleneck": 4, "dropout": 0.3}, "vpt": {"num_prompts": 3, "dropout": 0.3},
    "lora": {"r": 2, "lora_dropout": 0.3}, "peft:adalora": {"init_r": 4, "target_r": 2, "tfinal": 2},
    "bitfit": {}, "full": {}, "toy": {},
}  # fmt: skip
STEPS = 10  # two epochs of five batches, four of 5 images and one of 6


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved on the way out."""


def _attachment(method: str, toy: Make, seed: int) -> Any:
    """Return an attachment on always the same backbone; a resume must replace the adapters, which come from `seed`."""
    if method == "toy":
        return toy(seed)
    from petune.injector.attach import attach

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, depth=2, embed_dim=12, num_heads=2, num_classes=3,
        drop_path_rate=0.2,
    )  # fmt: skip
    torch.manual_seed(seed)
    att = attach(model, method, **METHODS[method])
    assert att.set_backbone_dropout(True) == 2  # drop path acts in frozen blocks, too
    return att


def _stop_at(step: int, stop: StopFlag) -> Callable[[Event], None]:
    def watch(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            stop.signal_name = "SIGTERM"

    return watch


def _stop_after(epoch: int, stop: StopFlag) -> Callable[[Event], None]:
    def watch(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.epoch == epoch:
            stop.signal_name = "SIGTERM"

    return watch


def _kill_at(step: int) -> Callable[[Event], None]:
    def watch(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            raise Killed

    return watch


def _outcome(att: Any, fitted: Any, directory: Path) -> tuple[dict[str, Tensor], bytes, Any]:
    state = {key: tensor.clone() for key, tensor in att.model.state_dict().items()}
    return state, (directory / "metrics.jsonl").read_bytes(), (fitted.epochs, fitted.epoch, dict(fitted.val.values))


def _assert_equal(found: Any, expected: Any) -> None:
    assert found[1:] == expected[1:]
    assert found[0].keys() == expected[0].keys()
    different = [key for key, tensor in expected[0].items() if not torch.equal(found[0][key], tensor)]
    assert different == []


def _uninterrupted(method: str, make: Make, toy: Make, directory: Path, **train: Any) -> Any:
    att = _attachment(method, toy, seed=1)
    np.random.seed(1)
    return _outcome(att, make(att, directory=directory, **train).fit(), directory)


def _resumed(method: str, make: Make, toy: Make, directory: Path, **train: Any) -> Any:
    att = _attachment(method, toy, seed=99)
    np.random.seed(99)  # another process would find other generators
    torch.manual_seed(99)
    return _outcome(att, make(att, directory=directory, **train).fit(), directory)


@pytest.mark.parametrize(
    "mixing",
    [pytest.param({}, marks=pytest.mark.exhaustive), {"mixup": 0.8, "cutmix": 1.0}],
    ids=["plain", "mixed"],
)
@pytest.mark.parametrize("method", sampled(METHODS, "adaptformer".__eq__))
def test_a_run_stopped_at_any_step_resumes_bit_for_bit(
    method: str, mixing: dict[str, float], tmp_path: Path, make_trainer: Make, toy: Make
) -> None:
    expected = _uninterrupted(method, make_trainer, toy, tmp_path / "whole", **mixing)
    for step in range(1, STEPS + 1):
        directory, stop = tmp_path / f"stopped-{step}", StopFlag()
        trainer = make_trainer(
            _attachment(method, toy, seed=1),
            directory=directory,
            stop=stop,
            on_event=_stop_at(step, stop),
            **mixing,
        )
        with pytest.raises(Stopped, match="saved"):
            trainer.fit()
        assert sorted(p.name for p in (directory / "checkpoints").iterdir())[-1] == f"step-{step:09}"
        _assert_equal(_resumed(method, make_trainer, toy, directory, **mixing), expected)


@pytest.mark.parametrize("optimizer", ["sgd", "nmuon", "lamb"])
def test_a_resume_with_other_optimizers(optimizer: str, tmp_path: Path, make_trainer: Make, toy: Make) -> None:
    expected = _uninterrupted("toy", make_trainer, toy, tmp_path / "whole", optimizer=optimizer)
    stop = StopFlag()
    trainer = make_trainer(toy(1), directory=tmp_path / "b", stop=stop, on_event=_stop_at(3, stop), optimizer=optimizer)
    with pytest.raises(Stopped):
        trainer.fit()
    _assert_equal(_resumed("toy", make_trainer, toy, tmp_path / "b", optimizer=optimizer), expected)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_killed_run_logs_each_step_once(step: int, tmp_path: Path, make_trainer: Make, toy: Make) -> None:
    expected = _uninterrupted("toy", make_trainer, toy, tmp_path / "whole", log_every=1)
    with pytest.raises(Killed):
        make_trainer(toy(1), directory=tmp_path / "b", on_event=_kill_at(step), log_every=1).fit()
    seed = 99 if step > 5 else 1  # before the first checkpoint there is nothing but the same start
    att = toy(seed)
    found = _outcome(att, make_trainer(att, directory=tmp_path / "b", log_every=1).fit(), tmp_path / "b")
    _assert_equal(found, expected)


def test_checkpoints_that_take_long_are_rare(
    tmp_path: Path, make_trainer: Make, toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first epoch, before a stop, and after the last epoch."""

    def saved(directory: Path) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in (directory / "checkpoints").iterdir())

    monkeypatch.setattr(save_schedule, "QUICK_SAVE_S", 0.0)
    monkeypatch.setattr(save_schedule, "MAX_SHARE", 1e-6)
    expected = _uninterrupted("toy", make_trainer, toy, tmp_path / "whole", epochs=4)
    assert saved(tmp_path / "whole") == [5, 20]
    with pytest.raises(Killed):
        make_trainer(toy(1), directory=tmp_path / "b", on_event=_kill_at(18), epochs=4).fit()
    assert saved(tmp_path / "b") == [5]
    stop = StopFlag()
    trainer = make_trainer(toy(99), directory=tmp_path / "b", stop=stop, on_event=_stop_after(3, stop), epochs=4)
    with pytest.raises(Stopped):
        trainer.fit()
    assert saved(tmp_path / "b") == [10, 15]
    _assert_equal(_resumed("toy", make_trainer, toy, tmp_path / "b", epochs=4), expected)


def test_a_resume_after_a_stop_in_validation(tmp_path: Path, make_trainer: Make, toy: Make) -> None:
    expected = _uninterrupted("toy", make_trainer, toy, tmp_path / "whole")
    stop, att = StopFlag(), toy(1)
    trainer = make_trainer(att, directory=tmp_path / "b", stop=stop, eval_batch_size=4)

    def in_eval(module: torch.nn.Module, _: Any) -> None:
        if not module.training:
            stop.signal_name = "SIGINT"

    handle = att.model.register_forward_pre_hook(in_eval)
    with pytest.raises(Stopped, match="SIGINT"):
        trainer.fit()
    handle.remove()
    steps: list[int] = []
    att = toy(99)
    trainer = make_trainer(
        att,
        directory=tmp_path / "b",
        on_event=lambda e: steps.append(e.step) if isinstance(e, StepDone) else None,
    )
    _assert_equal(_outcome(att, trainer.fit(), tmp_path / "b"), expected)
    assert steps == [6, 7, 8, 9, 10]  # no step of the first epoch was done twice


def test_a_damaged_checkpoint_costs_an_epoch_and_is_reported(tmp_path: Path, make_trainer: Make, toy: Make) -> None:
    expected = _uninterrupted("toy", make_trainer, toy, tmp_path / "whole", epochs=3)
    with pytest.raises(Killed):
        make_trainer(toy(1), directory=tmp_path / "b", on_event=_kill_at(12), epochs=3).fit()
    file = tmp_path / "b" / "checkpoints" / "step-000000010" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    notes: list[str] = []
    att = toy(99)
    trainer = make_trainer(
        att,
        directory=tmp_path / "b",
        epochs=3,
        on_event=lambda e: notes.append(e.text) if isinstance(e, Note) else None,
    )
    _assert_equal(_outcome(att, trainer.fit(), tmp_path / "b"), expected)
    assert len(notes) == 1
    assert str(file) in notes[0]
    assert str(file) in (tmp_path / "b" / "notes.txt").read_text()


def test_a_checkpoint_without_the_rest_of_each_epoch_is_refused(tmp_path: Path, make_trainer: Make, toy: Make) -> None:
    """Older versions left out what fills no batch, here two of 26 images, and recorded no number of batches."""
    make_trainer(toy(1)).fit()
    state_file = max((tmp_path / "checkpoints").glob("*")) / "state.json"
    state = json.loads(state_file.read_text())
    state["progress"]["steps_per_epoch"] = 0
    state_file.write_text(json.dumps(state))
    write_manifest(state_file.parent, [file.name for file in state_file.parent.iterdir() if file.name != MANIFEST])
    with pytest.raises(CheckpointError, match="left out 2 of 26 images in every epoch"):
        make_trainer(toy(1)).fit()


@pytest.mark.parametrize("augment", ["crop", "paddle_study"])
def test_a_checkpoint_with_older_crops_is_refused(augment: str, make_trainer: Make, toy: Make, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        make_trainer(toy(1), augment=augment, on_event=_kill_at(12), epochs=3).fit()
    state_file = max((tmp_path / "checkpoints").glob("*")) / "state.json"
    state = json.loads(state_file.read_text())
    assert state["progress"].pop("augment_format") == AUGMENT_FORMAT
    state_file.write_text(json.dumps(state))
    write_manifest(state_file.parent, [file.name for file in state_file.parent.iterdir() if file.name != MANIFEST])
    trainer = make_trainer(toy(1), augment=augment, epochs=3)
    if augment == "paddle_study":  # the same images as before
        trainer.fit()
        return
    with pytest.raises(CheckpointError, match="cropped images in another way"):
        trainer.fit()


def test_a_finished_run_is_not_repeated(tmp_path: Path, make_trainer: Make, toy: Make) -> None:
    expected = _uninterrupted("toy", make_trainer, toy, tmp_path / "whole")
    att, steps = toy(99), list[Event]()
    found = _outcome(
        att, make_trainer(att, directory=tmp_path / "whole", on_event=steps.append).fit(), tmp_path / "whole"
    )
    _assert_equal(found, expected)
    assert steps == []


@pytest.mark.parametrize("method", ["adaptformer", "vpt", "lora", "bitfit"])
def test_only_trainable_tensors_change(method: str, make_trainer: Make, toy: Make) -> None:
    att = _attachment(method, toy, seed=1)
    before = {key: tensor.clone() for key, tensor in att.model.state_dict().items()}
    make_trainer(att, keep="last").fit()
    trained = {*att.tuned, *att.head}
    changed = {key for key, tensor in att.model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == trained
    assert trained < set(before)


@pytest.mark.parametrize("has_bf16", [(True, False), (False, True)])
def test_a_resume_keeps_the_number_format(
    has_bf16: tuple[bool, bool], tmp_path: Path, make_trainer: Make, toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: has_bf16[0])
    expected = _uninterrupted("adaptformer", make_trainer, toy, tmp_path / "whole", precision="auto")
    stop = StopFlag()
    trainer = make_trainer(
        _attachment("adaptformer", toy, seed=1), directory=tmp_path / "b", stop=stop, on_event=_stop_at(3, stop),
        precision="auto",
    )  # fmt: skip
    with pytest.raises(Stopped):
        trainer.fit()
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: has_bf16[1])
    _assert_equal(_resumed("adaptformer", make_trainer, toy, tmp_path / "b", precision="auto"), expected)
