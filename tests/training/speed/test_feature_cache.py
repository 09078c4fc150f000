"""Cached features: the frozen part runs once per image, and the run is the same to the bit, interrupted or not."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

import petune
from petune.base.errors import ConfigError, Diverged, Stopped
from petune.training.events import Event, Note, StepDone
from petune.training.speed import feature_cache, speedups
from petune.training.speed.feature_cache import why_too_large
from petune.training.speed.frozen_prefix import find_prefix
from petune.training.stop import StopFlag
from tests.sampling import sampled

Make = Callable[..., Any]
SIZE = {"img_size": 8, "patch_size": 4, "depth": 3, "embed_dim": 12, "num_heads": 2, "num_classes": 3}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "partial": {},
    "lst": {"reduction": 2},
    "adaptformer": {"blocks": "last:1", "bottleneck": 2},
    "vpt": {"blocks": "last:1", "num_prompts": 2},
    "bitfit": {"blocks": "last:1"},
}
FEW_KEPT = {
    "linear": 12 * 4,
    "partial": 5 * 12 * 4,
    "lst": 3 * 5 * 12 * 4,
    "adaptformer": 5 * 12 * 4,
    "vpt": 5 * 12 * 4,
    "bitfit": 5 * 12 * 4,
}  # bytes per image: the input of the head, of the last block, of all three blocks


class Killed(BaseException):
    """Stands for SIGKILL."""


def _attachment(method: str, *, pool: str = "token", options: dict[str, Any] | None = None) -> petune.Attachment:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", global_pool=pool, drop_rate=0.2, drop_path_rate=0.2, **SIZE)
    torch.manual_seed(1)
    return petune.attach(model, method, **(METHODS.get(method, {}) if options is None else options))


def _count(module: nn.Module) -> list[int]:
    """Return a list to which the module will add the number of images of each call."""
    seen: list[int] = []
    module.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    original = module.forward

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(x))
        return original(x, *args, **kwargs)

    module._forward_hooks.clear()
    module.forward = forward  # type: ignore[method-assign]
    return seen


def _trained(make: Make, directory: Path, method: str, **settings: Any) -> tuple[dict[str, Any], bytes, Any]:
    att = _attachment(method)
    fitted = make(att, directory=directory, augment="none", **settings).fit()
    return dict(att.model.state_dict()), (directory / "metrics.jsonl").read_bytes(), fitted.epochs


def _assert_same(a: Any, b: Any) -> None:
    assert a[1:] == b[1:]
    assert [key for key in a[0] if not torch.equal(a[0][key], b[0][key])] == []


@pytest.mark.parametrize(("rates", "is_random"), [({"drop_rate": 0.5}, False), ({"drop_path_rate": 0.5}, True)])
def test_only_dropout_above_the_frozen_prefix_allows_caching(
    rates: dict[str, float], is_random: bool, tmp_path: Path, make_trainer: Make
) -> None:
    def trained(name: str, cache_features: str) -> tuple[dict[str, Any], bytes, Any]:
        torch.manual_seed(0)
        att = petune.attach(timm.create_model("vit_tiny_patch16_224", **rates, **SIZE), "partial")
        att.set_backbone_dropout(True)
        settings = {"augment": "none", "epochs": 3, "log_every": 1, "cache_features": cache_features}
        fitted = make_trainer(att, directory=tmp_path / name, **settings).fit()
        return dict(att.model.state_dict()), (tmp_path / name / "metrics.jsonl").read_bytes(), fitted.epochs

    if is_random:
        with pytest.raises(ConfigError, match="drop path of the backbone changes the features"):
            trained("refused", "always")
    else:
        _assert_same(trained("cached", "always"), trained("whole", "never"))


@pytest.mark.parametrize("precision", sampled(["fp32", "bf16"], "bf16".__eq__))
@pytest.mark.parametrize("method", sampled(METHODS, {"linear", "adaptformer"}.__contains__))
def test_caching_does_not_change_a_run(method: str, precision: str, tmp_path: Path, make_trainer: Make) -> None:
    settings = {"epochs": 3, "precision": precision, "log_every": 1}
    without = _trained(make_trainer, tmp_path / "a", method, cache_features="never", **settings)
    _assert_same(_trained(make_trainer, tmp_path / "b", method, cache_features="always", **settings), without)
    assert not (tmp_path / "b" / "features").exists()


def test_the_frozen_part_runs_once_per_image(make_trainer: Make) -> None:
    att = _attachment("linear")
    trainer = make_trainer(att, augment="none", epochs=10)
    seen = _count(att.model.blocks[1])
    trainer.fit()
    train, val = len(trainer.job.dataset.train), len(trainer.job.dataset.val)
    assert train + val <= sum(seen) < 1.3 * (train + val) + 20  # 20: a padded batch each, and the proofs on a few
    trainer.evaluate("test")
    assert sum(seen) > train + val + len(trainer.job.dataset.test) - 1


@pytest.mark.parametrize("method", FEW_KEPT)
def test_little_is_cached_per_image(method: str) -> None:
    att = _attachment(method)
    att.train()
    prefix = find_prefix(att, torch.randn(2, 3, 8, 8))
    assert prefix is not None
    assert prefix.bytes_per_image == FEW_KEPT[method]


@pytest.mark.parametrize("method", ["adaptformer", "vpt", "bitfit", "full"])
def test_methods_that_train_the_first_block_are_not_cached(method: str, make_trainer: Make) -> None:
    att = _attachment(method, options={})
    trainer = make_trainer(att, augment="none")
    trainer.fit()
    with pytest.raises(ConfigError, match="trains so far down"):
        make_trainer(
            _attachment(method, options={}),
            directory=trainer.job.directory / "2",
            augment="none",
            cache_features="always",
        ).fit()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"augment": "shift"}, "augment=shift changes the images each time"),
        ({"augment": "none", "mixup": 0.5}, "mixup=0.5 changes the images each time. mixup=0 would"),
        ({"augment": "none", "feature_cache_gb": 1e-6}, "35 images of 0.0 kB need 0.00 GB"),
        ({"augment": "none", "grad_checkpointing": True}, "grad_checkpointing computes blocks again"),
    ],
)
def test_a_run_that_cannot_cache_says_why(
    settings: dict[str, Any], reason: str, tmp_path: Path, make_trainer: Make
) -> None:
    notes: list[str] = []

    def watch(event: Event) -> None:
        notes.extend([event.text] if isinstance(event, Note) else [])

    fitted = make_trainer(_attachment("linear"), on_event=watch, **settings).fit()
    assert len(fitted.epochs) == 2
    assert len(notes) == 1
    assert notes[0].startswith("the frozen layers run in every epoch: ")
    assert reason in notes[0]
    with pytest.raises(ConfigError, match="cache_features=always is not possible"):
        make_trainer(_attachment("linear"), directory=tmp_path / "2", cache_features="always", **settings).fit()


def test_a_directory_that_is_not_writable_is_reported(tmp_path: Path, make_trainer: Make) -> None:
    (tmp_path / "features").write_text("in the way")
    notes: list[str] = []
    fitted = make_trainer(
        _attachment("linear"), augment="none", on_event=lambda e: notes.extend([e.text] if isinstance(e, Note) else [])
    ).fit()
    assert len(fitted.epochs) == 2
    assert "is not writable" in notes[0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", sampled(["linear", "lst"], "linear".__eq__))
def test_a_resume_uses_the_cached_features(method: str, tmp_path: Path, make_trainer: Make) -> None:
    expected = _trained(make_trainer, tmp_path / "whole", method)
    for step in (1, 6):
        stop = StopFlag()

        def watch(event: Event, at: int = step, flag: StopFlag = stop) -> None:
            if isinstance(event, StepDone) and event.step == at:
                flag.signal_name = "SIGTERM"

        directory = tmp_path / f"stopped-{step}"
        with pytest.raises(Stopped):
            _trained_with(make_trainer, directory, method, stop=stop, on_event=watch)
        assert (directory / "features" / "train" / "mark.json").exists()
        seen = _resumed_counting(make_trainer, directory, method, expected)
        assert seen < 20  # the proofs, and no image of the splits

        def kill(event: Event, at: int = step) -> None:
            if isinstance(event, StepDone) and event.step == at:
                raise Killed

        with pytest.raises(Killed):
            _trained_with(make_trainer, tmp_path / f"killed-{step}", method, on_event=kill)
        _resumed_counting(make_trainer, tmp_path / f"killed-{step}", method, expected)


def _trained_with(make: Make, directory: Path, method: str, **hooks: Any) -> None:
    make(_attachment(method), directory=directory, augment="none", **hooks).fit()


def _resumed_counting(make: Make, directory: Path, method: str, expected: Any) -> int:
    att = _attachment(method)
    trainer = make(att, directory=directory, augment="none")
    seen = _count(att.model.blocks[1])
    fitted = trainer.fit()
    del att.model.blocks[1].__dict__["forward"]
    state = dict(att.model.state_dict())
    _assert_same((state, (directory / "metrics.jsonl").read_bytes(), fitted.epochs), expected)
    return sum(seen)


def test_a_resume_computes_the_missing_features(tmp_path: Path, make_trainer: Make) -> None:
    expected = _trained(make_trainer, tmp_path / "whole", "linear")
    stop, att = StopFlag(), _attachment("linear")
    trainer = make_trainer(att, directory=tmp_path / "b", augment="none", stop=stop)
    calls: list[int] = []

    def after_some(module: nn.Module, args: Any, out: Any) -> None:
        calls.append(len(args[0]))
        if calls.count(6) == 3:  # the batches of six are those of the training split
            stop.signal_name = "SIGTERM"

    handle = att.model.blocks[0].register_forward_hook(after_some)
    with pytest.raises(Stopped, match="saved"):
        trainer.fit()
    handle.remove()
    assert json.loads((tmp_path / "b" / "features" / "train" / "mark.json").read_text())["done"] == 18
    assert _resumed_counting(make_trainer, tmp_path / "b", "linear", expected) < 26 + 9 + 20 - 18 + 16


def test_features_of_other_weights_are_not_used(tmp_path: Path, make_trainer: Make) -> None:
    def kill(event: Event) -> None:
        if isinstance(event, StepDone):
            raise Killed

    with pytest.raises(Killed):
        _trained_with(make_trainer, tmp_path / "b", "linear", on_event=kill)
    found, wanted = [], []
    for directory, into in ((tmp_path / "b", found), (tmp_path / "c", wanted)):
        att = _attachment("linear")
        with torch.no_grad():
            att.model.blocks[0].mlp.fc1.weight.mul_(1.5)
        into += make_trainer(att, directory=directory, augment="none").fit().epochs
    assert found == wanted


class Skips(nn.Module):
    """Multiplies its output by a number that it computes from the image: no cached tensor has it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = timm.create_model("vit_tiny_patch16_224", **SIZE)
        self.first = self.inside.patch_embed
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inside(x)
        return out * float(x.detach().abs().mean())


def test_a_model_that_cannot_be_split_is_not_cached(make_trainer: Make) -> None:
    torch.manual_seed(0)
    att = petune.attach(Skips(), "linear", input_size=(3, 8, 8))
    notes: list[str] = []
    make_trainer(att, augment="none", on_event=lambda e: notes.extend([e.text] if isinstance(e, Note) else [])).fit()
    assert len(notes) == 1
    assert "Skips cannot be split: its logits or gradients would differ" in notes[0]


class Counts(nn.Module):
    """Asks how many images a frozen module has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = timm.create_model("vit_tiny_patch16_224", **SIZE)
        self.head = nn.Linear(SIZE["embed_dim"], 3)
        self.inside.reset_classifier(0)
        self.norm = nn.LayerNorm(SIZE["embed_dim"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        out: torch.Tensor = self.head(self.norm(x).reshape(len(x), -1)).reshape(len(x), 3)
        return out


@pytest.mark.filterwarnings("ignore:the head of Counts is head")
@pytest.mark.parametrize(
    ("model", "one_blank"), [(Counts, False), (lambda: timm.create_model("vit_tiny_patch16_224", **SIZE), True)]
)
def test_one_blank_image_suffices_unless_the_model_counts_images(
    model: Callable[[], nn.Module], one_blank: bool, make_trainer: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used, found, fill = set[bool](), [], speedups.fill_cache

    def noting(context: Any, plan: Any, micro_batch: int) -> Any:
        used.add(plan.prefix.one_blank)
        return fill(context, plan, micro_batch)

    monkeypatch.setattr(speedups, "fill_cache", noting)
    for wanted in ("never", "always"):
        torch.manual_seed(0)
        att = petune.attach(model(), "linear", input_size=(3, 8, 8))
        make_trainer(att, directory=tmp_path / wanted, augment="none", cache_features=wanted).fit()
        found.append(torch.cat([p.detach().flatten() for p in att.parameters()]))
    assert torch.equal(*found)
    assert used == {one_blank}


@pytest.mark.parametrize("pool", sampled(["token", "avg"], "token".__eq__))
@pytest.mark.parametrize("method", METHODS)
def test_the_rest_gives_the_logits_and_gradients_of_the_whole_model(method: str, pool: str) -> None:
    att = _attachment(method, pool=pool)
    for p in att.tuned.values():
        nn.init.normal_(p, std=0.2)
    att.train()
    replaced = [m.__dict__.get("forward") for m in att.model.modules()]  # by prompts
    prefix = find_prefix(att, torch.randn(2, 3, 8, 8))
    assert prefix is not None
    x, found = torch.randn(4, 3, 8, 8), []
    for forward in (lambda: att.model(x), lambda: prefix.forward(prefix.compute(x))):
        torch.manual_seed(2)
        logits = forward()
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in att.parameters())])
        for p in att.parameters():
            p.grad = None
    assert [torch.equal(a, b) for a, b in zip(*found, strict=True)] == [True] * len(found[0])
    assert [m.__dict__.get("forward") for m in att.model.modules()] == replaced


def test_cached_features_count_as_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000))
    assert "GB are free" in why_too_large(100, 100, 1.0, tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "features.bin").write_bytes(bytes(10_000))
    assert why_too_large(100, 100, 1.0, tmp_path) == ""
    assert "train.feature_cache_gb" in why_too_large(100, 100, 1e-9, tmp_path)


def test_a_diverged_run_deletes_its_features(make_trainer: Make) -> None:
    trainer = make_trainer(_attachment("linear"), augment="none", lr=1e4, optimizer="sgd", epochs=30, grad_clip=None)
    with torch.no_grad():
        trainer.model.head.weight.mul_(1e38)
    with pytest.raises(Diverged):
        trainer.fit()
    assert not (trainer.job.directory / "features").exists()


def test_time_s_includes_computing_features(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = feature_cache.fill_cache

    def slow(*args: Any) -> Any:
        time.sleep(0.6)
        return fill(*args)

    monkeypatch.setattr(speedups, "fill_cache", slow)
    assert make_trainer(_attachment("linear"), augment="none").fit().time_s > 0.6


def test_a_cached_run_says_that_nothing_is_compiled(make_trainer: Make) -> None:
    notes: list[str] = []

    def watch(event: Event) -> None:
        notes.extend([event.text] if isinstance(event, Note) else [])

    make_trainer(_attachment("linear"), augment="none", compile=True, on_event=watch).fit()
    assert any("nothing is compiled" in note for note in notes)
