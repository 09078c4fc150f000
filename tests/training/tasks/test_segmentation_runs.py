"""Runs of segmentation: every method, other families, an interruption, micro-batches, cached features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_canvases import NAMES as ALL_NAMES, write_canvases
from safetensors.torch import load_file

import petune
from petune.base.errors import ConfigError, Stopped
from petune.runner.result import RunResult
from petune.serving.restore import restore
from petune.training.events import Event, StepDone
from tests.program import call
from tests.sampling import sampled

NAMES = ALL_NAMES[:3]
SHORT = {
    "backbone": "vit_nano", "weights": "none", "backbone_options": {"depth": 2, "embed_dim": 24, "num_heads": 2},
    "image_size": 16, "device": "cpu", "method": "adaptformer:bottleneck=4",
}  # fmt: skip
TRAIN = {"epochs": 2, "batch_size": 8, "precision": "fp32", "lr": 0.01, "augment": "none"}
TUNERS = [t.name for t in petune.list_tuners() if t.name != "peft"]  # it needs a type
FAMILIES = {
    "swin": {"backbone": "swin_tiny_patch4_window7_224", "image_size": 32, "backbone_options":
             {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": [1, 2], "num_heads": [1, 2]}},
    "torchvision": {"backbone": "torchvision:vit_b_16", "image_size": 32, "backbone_options": {}},
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_canvases(tmp_path_factory.mktemp("canvases"), 30, 32, 44)


def config(output: Path, dataset: str, **fields: Any) -> petune.RunConfig:
    train = {**TRAIN, **fields.pop("train", {})}
    return petune.RunConfig.build({**SHORT, "dataset": dataset, "train": train, "output": output, **fields})


def trained(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("tuner", sampled(TUNERS, "vpt".__eq__))
@pytest.mark.filterwarnings("ignore:VisionTransformer reads the weights")
def test_every_tuner_trains(tuner: str, dataset: str, tmp_path: Path) -> None:
    task = "segmentation:blocks=last:2,loss=ce_dice"
    result = petune.run(config(tmp_path / "run", dataset, method=tuner, task=task))
    assert 0 < result.metrics["miou"] < 100
    saved = trained(tmp_path / "run")
    head = {"dense_head.norm.weight", "dense_head.norm.running_mean", "dense_head.linear.weight"}
    assert any(key.endswith("dense_head.linear.weight") for key in saved) or head <= saved.keys()
    again = petune.evaluate(tmp_path / "run")
    assert again.metrics["miou"] == pytest.approx(result.metrics["miou"], abs=0.05)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("family", "tuner"), [("swin", "full"), ("swin", "lora"), ("swin", "adaptformer"), ("torchvision", "adaptformer")]
)
def test_other_families(family: str, tuner: str, dataset: str, tmp_path: Path) -> None:
    fields = {**FAMILIES[family], "method": tuner, "task": "segmentation:blocks=last:2"}
    result = petune.run(config(tmp_path / "run", dataset, **fields))
    assert result.metrics["miou"] > 0
    again = petune.evaluate(tmp_path / "run")
    assert again.metrics["miou"] == pytest.approx(result.metrics["miou"], abs=0.05)


@pytest.mark.exhaustive
def test_a_vit_of_transformers(dataset: str, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4)).save_pretrained(tmp_path / "vit")
    fields = {"backbone": f"hf:{tmp_path / 'vit'}", "weights": "default", "backbone_options": {}, "image_size": None}
    result = petune.run(config(tmp_path / "run", dataset, **fields))
    again = petune.evaluate(tmp_path / "run")
    assert again.metrics["miou"] == pytest.approx(result.metrics["miou"], abs=0.05)


@pytest.mark.exhaustive
def test_a_run_resumes_to_the_bit(dataset: str, tmp_path: Path) -> None:
    """The running statistics of the head's BatchNorm are a part of the state."""
    petune.run(config(tmp_path / "whole", dataset))

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 4:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Stopped)):
        petune.run(config(tmp_path / "parts", dataset), watch=stop)
    petune.run(config(tmp_path / "parts", dataset, resume=True))
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    assert {"dense_head.norm.running_var", "dense_head.linear.bias"} <= whole.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.exhaustive
def test_speedups_do_not_change_a_run(dataset: str, tmp_path: Path) -> None:
    """Checkpointed blocks run again in the backward pass; cached features enter the head."""
    for name, method, options in (
        ("checkpointed", "lora", {"grad_checkpointing": True}),
        ("cached", "linear", {"cache_features": "always"}),
    ):
        for output, changed in (("plain", {"cache_features": "never"}), (name, options)):
            petune.run(config(tmp_path / method / output, dataset, method=method, train=changed))
        plain, other = trained(tmp_path / method / "plain"), trained(tmp_path / method / name)
        for key in plain:
            torch.testing.assert_close(plain[key], other[key], atol=1e-5, rtol=1e-4)


@pytest.mark.exhaustive
def test_micro_batches_have_statistics_of_their_own(dataset: str, tmp_path: Path) -> None:
    """As those of every BatchNorm; the loss of an image does not depend on the others, so the steps are close."""
    for name, micro in (("whole", None), ("parts", 4)):
        train = {"micro_batch_size": micro, "epochs": 1}
        petune.run(config(tmp_path / name, dataset, method="linear", train=train))
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    assert float((whole["dense_head.linear.weight"] - parts["dense_head.linear.weight"]).abs().max()) < 0.02


@pytest.mark.exhaustive
def test_more_classes_and_other_tasks_start_from_its_adapter(dataset: str, tmp_path: Path) -> None:
    petune.run(config(tmp_path / "first", dataset))
    more = write_canvases(tmp_path / "more", 20).replace("one]", "one,two]")
    result = petune.run(from_run=tmp_path / "first", dataset=more, output=tmp_path / "second", train=TRAIN)
    assert "iou/two" in {metric.name for metric in result.metric_info}
    digits = {"epochs": 1, "batch_size": 64, "augment": "none"}
    petune.run(from_run=tmp_path / "first", dataset="digits", shots=4, output=tmp_path / "digits", train=digits)
    back = petune.run(from_run=tmp_path / "digits", dataset=dataset, output=tmp_path / "back", train=TRAIN)
    assert back.task == "segmentation"


def test_what_makes_no_sense_is_one_error_before_training(dataset: str, tmp_path: Path) -> None:
    for fields, message in (
        ({"task": "segmentation:blocks=last:9"}, "last:1 to last:2"),
        ({"train": {"mixup": 0.5}}, "mixup"),
        ({"head": "bn_linear"}, "head"),
        ({"task": "classification"}, "mask"),
    ):
        with pytest.raises(ConfigError, match=message):
            petune.run(config(tmp_path / "run", dataset, **fields))


@pytest.mark.exhaustive
def test_a_dry_run_counts_the_head(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = call(
        "run", "--dry-run", "--backbone", "vit_nano", "--dataset", dataset, "--method", "linear", capture=capsys
    )
    assert done.code == 0, done.err
    assert f"{2 * 192 + len(NAMES) * 193:,}" in done.err


@pytest.mark.exhaustive
def test_the_model_is_the_one_that_was_trained(dataset: str, tmp_path: Path) -> None:
    result = petune.run(config(tmp_path / "run", dataset))
    restored = restore(tmp_path / "run", None)
    assert restored.attachment.sites.head.path == "dense_head"
    assert result.head == 2 * 24 + len(NAMES) * 25
    with torch.no_grad():
        assert restored.backbone.model.eval()(torch.zeros(1, 3, 16, 16)).shape == (1, len(NAMES), 16, 16)
    assert np.isfinite(result.metrics["pixel_accuracy"])
    assert RunResult.read(tmp_path / "run").metrics == result.metrics


@pytest.mark.exhaustive
def test_weights_of_a_pretraining_leave_out_its_head(dataset: str, tmp_path: Path) -> None:
    fields = {key: value for key, value in SHORT.items() if key != "method"}
    train = {**TRAIN, "epochs": 1, "label_smoothing": 0.1}
    petune.pretrain(**fields, dataset=dataset, output=tmp_path / "weights", train=train)
    for name, other in (("masks", dataset), ("digits", "digits")):
        run = config(tmp_path / name, other, weights=str(tmp_path / "weights"), train={"epochs": 1, "batch_size": 64})
        assert petune.run(run).metrics
