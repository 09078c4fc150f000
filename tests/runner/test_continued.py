"""A run that continues from a finished one: same method and backbone, its values, a fresh optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import petune
from petune.base.errors import BackboneMismatch, CheckpointError, ConfigError, Stopped
from petune.injector.registry import build_tuner
from petune.runner.run_config import RunConfig
from petune.training.events import Event, Note, StepDone
from petune.training.stop import StopFlag
from tests.sampling import sampled
from tests.trained import changed

TINY: dict[str, Any] = {
    "backbone": "vit_nano", "weights": "none", "backbone_options": {"depth": 2, "embed_dim": 48}, "dataset": "digits",
    "shots": 4, "seed": 3, "device": "cpu",
}  # fmt: skip
TRAIN: dict[str, Any] = {"epochs": 1, "batch_size": 10, "precision": "fp32"}
STILL = {**TRAIN, "lr": 1e-10, "weight_decay": 0.0}
"""Training that moves nothing, so that the result shows the start."""


def _finished(directory: Path, method: str = "adaptformer:bottleneck=4", **options: Any) -> Path:
    petune.run(method=method, **{**TINY, **options}, train={**TRAIN, "lr": 0.02}, output=directory)
    return directory


def _tensors(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def _different(a: Path, b: Path) -> list[str]:
    other = _tensors(b)
    return [key for key, tensor in _tensors(a).items() if not torch.equal(tensor, other[key])]


def _metadata(run_dir: Path) -> dict[str, Any]:
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    return dict(config.get("metadata") or config["auto_mapping"]["petune"]["metadata"])


def _two_classes(folder: Path) -> str:
    generator = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(level - 30, level + 30, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of AdaptFormer."""
    return _finished(tmp_path_factory.mktemp("source") / "run")


CONTINUED = ["adaptformer:bottleneck=4", "vpt:num_prompts=2", "lora:r=2", "peft:vera", "bitfit", "full", "linear"]


@pytest.mark.parametrize("method", sampled(CONTINUED, {"adaptformer:bottleneck=4", "full"}.__contains__))
def test_a_run_starts_from_the_values_of_another(method: str, tmp_path: Path) -> None:
    first = _finished(tmp_path / "first", method)
    again = petune.run(from_run=first, train=STILL, output=tmp_path / "again", device="cpu")
    old, new = _tensors(first), _tensors(tmp_path / "again")
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        torch.testing.assert_close(new[key], tensor, atol=1e-6, rtol=1e-6)
    before = petune.RunResult.read(first)
    assert (again.method, again.dataset, again.seed) == (method, "digits", 3)
    assert (again.top1, again.val_top1, again.tuned) == (before.top1, before.val_top1, before.tuned)


@pytest.mark.parametrize("method", sampled(["adaptformer:bottleneck=4", "lora:r=2", "full"], "lora:r=2".__eq__))
@pytest.mark.parametrize("head", sampled(["linear", "bn_linear"], "bn_linear".__eq__))
def test_other_classes_get_a_new_classifier(method: str, head: str, tmp_path: Path) -> None:
    first = _finished(tmp_path / "first", method, head=head)
    notes: list[str] = []

    def watch(event: Event) -> None:
        notes.extend([event.text] if isinstance(event, Note) else [])

    output = tmp_path / "next"
    petune.run(
        from_run=first / "adapter", dataset=_two_classes(tmp_path / "images"), device="cpu", train=STILL,
        output=output, watch=watch,
    )  # fmt: skip
    old, new = _tensors(first), _tensors(output)
    classifier = {key for key in old if ".head." in f".{key}"}
    assert {tuple(new[key].shape) for key in classifier if key.endswith("weight")} == {(2, 48)}
    assert old.keys() == new.keys()
    for key in old.keys() - classifier:
        torch.testing.assert_close(new[key], old[key], atol=1e-6, rtol=1e-6)
    assert any("continues from" in note and "new classifier" in note for note in notes)
    assert _metadata(output)["classes"] == ["dark", "light"]
    assert len(petune.predict(output, [tmp_path / "images" / "dark" / "0.png"])[0].top) == 2


def _numbers(folder: Path, low: int, high: int) -> str:
    """Gray images whose number is their level."""
    folder.mkdir()
    levels = np.linspace(low, high, 60).astype(int)
    for number, level in enumerate(levels):
        Image.new("RGB", (8, 8), (int(level),) * 3).save(folder / f"{number}.png")
    lines = ["image,level", *(f"{number}.png,{level}" for number, level in enumerate(levels))]
    (folder / "table.csv").write_text("\n".join(lines))
    return f"table:{folder / 'table.csv'},target=level"


def test_a_continued_head_of_numbers_keeps_their_mean_and_deviation(tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    options = {**TINY, "shots": None, "image_size": 8, "dataset": _numbers(tmp_path / "a", 0, 250)}
    petune.run(method="linear", **options, train=TRAIN, output=first)
    petune.run(
        from_run=first, dataset=_numbers(tmp_path / "b", 200, 250), device="cpu", train=STILL, output=again
    )  # fmt: skip
    assert _metadata(again)["task"]["state"] == _metadata(first)["task"]["state"]
    image = tmp_path / "b" / "0.png"
    before, after = (petune.predict(run, [image])[0].numbers["level"] for run in (first, again))
    assert after == pytest.approx(before, rel=1e-4)


def test_the_configuration_is_complete_and_repeats_the_run(source: Path, tmp_path: Path) -> None:
    first = petune.run(from_run=source, train=TRAIN, device="cpu", output=tmp_path / "a")
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert config["from_run"] == str(source)
    assert (config["method"], config["backbone"], config["weights"]) == ("adaptformer:bottleneck=4", "vit_nano", "none")
    assert (config["backbone_options"], config["shots"]) == (TINY["backbone_options"], 4)
    assert config["train"]["lr"] is None  # training options are the new run's own
    again = petune.run(**{**config, "output": tmp_path / "b"})
    assert (again.top1, again.val_top1) == (first.top1, first.val_top1)
    assert {
        key for key, t in _tensors(tmp_path / "a").items() if not torch.equal(t, _tensors(tmp_path / "b")[key])
    } == set()


def test_a_continued_run_resumes_bit_for_bit(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"from_run": source, "train": {**TRAIN, "epochs": 2}, "device": "cpu"}
    petune.run(**options, output=tmp_path / "whole")
    flags: list[StopFlag] = []
    enter = StopFlag.__enter__
    monkeypatch.setattr(StopFlag, "__enter__", lambda self: flags.append(self) or enter(self))

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            flags[-1].signal_name = "SIGTERM"

    with pytest.raises(Stopped):
        petune.run(**options, output=tmp_path / "stopped", watch=stop)
    petune.run(**options, output=tmp_path / "stopped", resume=True)
    assert _different(tmp_path / "whole", tmp_path / "stopped") == []


def test_result_adapter_and_card_record_all_earlier_runs(source: Path, tmp_path: Path) -> None:
    petune.run(from_run=source, train=TRAIN, device="cpu", output=tmp_path / "second")
    third = petune.run(from_run=tmp_path / "second", train=TRAIN, device="cpu", output=tmp_path / "third")
    assert third.from_run == str(tmp_path / "second")
    recorded = third.provenance["continued_from"]
    assert [entry["path"] for entry in recorded] == [str(source / "adapter"), str(tmp_path / "second" / "adapter")]
    assert recorded == _metadata(tmp_path / "third")["continued_from"]
    card = (tmp_path / "third" / "adapter" / "README.md").read_text()
    assert "first trained on | digits, 1 epoch " in card
    assert str(source) not in card


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"method": "vpt"}, "method"),
        ({"method": "adaptformer:bottleneck=8"}, "bottleneck"),
        ({"backbone": "vit_tiny"}, "backbone"),
        ({"backbone_options": {"depth": 3}}, "backbone_options"),
        ({"image_size": 64}, "image_size"),
        ({"head": "bn_linear"}, "head"),
        ({"val_fraction": 0.3}, "val_fraction"),
    ],
)
def test_a_contradiction_is_an_error(given: dict[str, Any], named: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        petune.run(from_run=source, **given, output=tmp_path / "run")
    assert str(source) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_same_options_in_other_words_are_no_contradiction(source: Path, tmp_path: Path) -> None:
    default = build_tuner("adaptformer").config.plain()["dropout"]
    method = f"adaptformer:bottleneck=4,dropout={default}"
    done = petune.run(from_run=source, method=method, train=STILL, device="cpu", output=tmp_path / "run")
    assert done.top1 == petune.RunResult.read(source).top1


def test_another_backbone_is_refused_by_its_fingerprint(source: Path, tmp_path: Path) -> None:
    other = changed(source / "adapter", tmp_path / "other", backbone={**_metadata(source)["backbone"], "seed": 4})
    with pytest.raises(BackboneMismatch, match="other weights"):
        petune.run(from_run=other, train=TRAIN, device="cpu", output=tmp_path / "run")


def test_code_that_the_adapter_names_runs_only_on_request(source: Path, tmp_path: Path) -> None:
    backbone = {**_metadata(source)["backbone"], "name": "someones_module:make"}
    other = changed(source / "adapter", tmp_path / "other", backbone=backbone)
    with pytest.raises(ConfigError, match="code that would run here"):
        petune.run(from_run=other, output=tmp_path / "run")
    with pytest.raises(ConfigError, match="cannot import"):
        petune.run(from_run=other, backbone="someones_module:make", output=tmp_path / "run")


def test_a_resume_is_refused_if_the_first_adapter_changed(source: Path, tmp_path: Path) -> None:
    first = changed(source / "adapter", tmp_path / "first")
    train = {**TRAIN, "log_every": 1}
    options: dict[str, Any] = {"from_run": first, "output": tmp_path / "run", "device": "cpu", "train": train}

    def stop(event: Event) -> None:
        if isinstance(event, StepDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        petune.run(**options, watch=stop)
    other = changed(_finished(tmp_path / "other", seed=4) / "adapter", tmp_path / "changed")
    for file in other.iterdir():
        (first / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="has changed since"):
        petune.run(**options, resume=True)


@pytest.mark.parametrize("name", ["nothing", "unfinished"])
def test_a_directory_without_an_adapter_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("# petune run --config config.yaml\n")
    with pytest.raises(CheckpointError, match="not finished" if name == "unfinished" else "no run or adapter"):
        petune.run(from_run=tmp_path / name)


def test_a_pretraining_does_not_continue_from_an_adapter(source: Path) -> None:
    with pytest.raises(ConfigError, match="from_run"):
        petune.pretrain(from_run=source)


def test_a_configuration_without_from_run_stays_as_it_is() -> None:
    from petune.runner.continued import complete_from_run

    config = RunConfig(method="vpt")
    assert complete_from_run(config) is config
