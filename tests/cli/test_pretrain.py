"""`petune pretrain`, and its result used with --weights."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import petune as library
from petune.runner.backbone_file import write_weights
from petune.runner.pretrain import PretrainConfig, pretrain_name
from petune.serving.restore import restore

Run = Callable[..., Any]
Words = tuple[str, ...]


def test_the_result_is_used_with_weights(petune: Run, tiny: Words, tmp_path: Path) -> None:
    done = petune("pretrain", *tiny, "--json", "--tracker", "tensorboard")
    assert done.code == 0, done.err
    output = json.loads(done.out)["output"]
    assert output == "runs/pretrain-vit_nano-digits-seed0"
    options = "--set backbone_options.depth=2 --set backbone_options.embed_dim=48"
    assert done.err.endswith(f"use it with: --backbone vit_nano --weights {output} {options}\n")
    assert {"backbone.safetensors", "tensorboard"} <= {p.name for p in (tmp_path / output).iterdir()}
    tuned = petune("run", "--method", "linear", *tiny, "--weights", output, "--json")
    assert tuned.code == 0, tuned.err
    assert json.loads(tuned.out)["weights"] == f"{output}/backbone.safetensors"


def test_its_directory_is_in_runs_whatever_the_dataset_is_called() -> None:
    config = PretrainConfig(dataset="folder:../../../pets", backbone="package.module:factory")
    assert pretrain_name(config) == "pretrain-package.module_factory-folder_.._.._.._pets-seed0"


def test_its_defaults_apply_with_flags(petune: Run) -> None:
    done = petune("pretrain", "--lr", "1e-3", "--dry-run")
    train = yaml.safe_load(done.out)["train"]
    assert (train["lr"], train["epochs"], train["label_smoothing"]) == (0.001, 30, 0.1)
    assert "recipe              nmuon, learning rate 0.002, weight decay 0.05\n" in done.err


def test_there_is_no_flag_for_the_method(petune: Run) -> None:
    assert petune("pretrain", "--method", "vpt").code == 2


@pytest.mark.exhaustive
def test_adapters_can_be_part_of_a_pretraining(petune: Run, tiny: Words, tmp_path: Path) -> None:
    both = "adaptformer:variant=paddle_study,bottleneck=2,train_backbone=true"
    where = ("--set=mean=[0.5, 0.5, 0.5]", "--set=std=[0.2, 0.2, 0.2]", "--output=a pre", "--image-size=16")
    done = petune("pretrain", *tiny, f"--set=method={both}", *where)
    assert done.code == 0, done.err
    flags = done.err.splitlines()[-1].removeprefix("use it with: ")
    assert shlex.split(flags)[2:6] == ["--weights", "a pre", "--image-size", "16"]
    assert flags.endswith(f" --method {both}")
    backbone_flags = shlex.split(flags.partition(" --method")[0])
    tiny = (*backbone_flags, *(word for word in tiny if "backbone" not in word and "weights" not in word))
    words = ("--json", "--lr=1e-9", "--set=train.optimizer=sgd")
    for method in ("adaptformer:variant=paddle_study,bottleneck=2", both):
        tuned = petune("run", "--method", method, *tiny, *words, "--output", "out-" + method[-4:])
        assert tuned.code == 0, tuned.err
    with safe_open(tmp_path / "a pre" / "backbone.safetensors", "pt") as file:
        info = json.loads(file.metadata()["petune"])
        adapter = {key: file.get_tensor(key) for key in info["adapters"]}
    assert len(adapter) == 10  # 2 blocks: down, up, their biases, the scale
    assert (info["mean"], info["std"], info["method"]) == ([0.5] * 3, [0.2] * 3, both)
    saved = load_file(tmp_path / "out-ck=2" / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() < saved.keys()
    for key, tensor in adapter.items():  # at a tiny learning rate they stay as pretrained
        assert torch.allclose(saved[key], tensor, atol=1e-6)
        assert tensor.any() or not key.endswith(("weight", "scale"))
    assert restore(tmp_path / "out-ck=2").metadata["test"]["num_images"] == 359
    config = json.loads((tmp_path / "out-ck=2" / "adapter" / "adapter_config.json").read_text())
    assert config["metadata"]["preprocess"]["std"] == [0.2] * 3
    other = petune("run", "--method", "linear", *tiny, *words, "--output", "other")
    assert other.code == 4
    assert f"was pretrained with the adapters of {both}" in other.err
    further = petune("pretrain", *tiny, *words, f"--set=method={both}", "--output", "further")  # trains them further
    assert further.code == 0, further.err
    after = load_file(tmp_path / "further" / "backbone.safetensors")
    assert [key for key, tensor in adapter.items() if not torch.allclose(after[key], tensor, atol=1e-6)] == []
    without = petune("pretrain", *tiny, *words, "--output", "without")
    assert f"was pretrained with the adapters of {both}" in without.err


def test_a_method_with_frozen_parameters_is_refused(petune: Run, tiny: Words) -> None:
    done = petune("pretrain", *tiny, "--set=method=adaptformer")
    assert done.code == 2
    assert "pretraining trains everything, but adaptformer leaves" in done.err


def test_adapters_start_the_same_whatever_was_drawn_before(tmp_path: Path) -> None:
    shape = {"depth": 1, "embed_dim": 12, "num_heads": 2}
    train = {"epochs": 1, "precision": "fp32", "batch_size": 20}
    for seed in (1, 2):
        torch.manual_seed(seed)
        library.pretrain(
            method="adaptformer:train_backbone=true", backbone_options=shape, dataset="digits", shots=4,
            device="cpu", train=train, output=tmp_path / str(seed),
        )  # fmt: skip
    one, two = (load_file(tmp_path / str(seed) / "backbone.safetensors") for seed in (1, 2))
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def test_weights_that_share_memory_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    write_weights(model, tmp_path, {}, "fp32")
    saved = load_file(tmp_path / "backbone.safetensors")
    assert torch.equal(saved["0.weight"], saved["1.weight"])
