"""Weights that are read straight into place, and those that stay in their file: the same numbers as the usual way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import petune
from petune.backbones import create, timm_models
from petune.backbones.create import create_backbone
from petune.backbones.from_file import build_from_file
from petune.sites.file_values import file_slice_of, keep_rounded, read_layer_by_layer, settle
from petune.training.speed import bf16_weights

ROPE = {"depth": 1, "embed_dim": 96, "num_heads": 2, "img_size": 32, "patch_size": 16}


BACKBONE = "vit_tiny_patch16_224"
SHAPE = {"depth": 2, "img_size": 32, "patch_size": 8}


def save(file: Path) -> Path:
    """Write the weights of `BACKBONE`."""
    torch.manual_seed(1)
    save_file({key: t.contiguous() for key, t in timm.create_model(BACKBONE, **SHAPE).state_dict().items()}, file)
    return file


def in_file_of(model: nn.Module) -> set[str]:
    return {key for key, p in model.named_parameters() if file_slice_of(p) is not None}


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key


def usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create, "build_empty", lambda build: None)
    monkeypatch.setattr(timm_models, "build_from_file", lambda *args, **kwargs: None)


def written(path: Path, name: str, **options: Any) -> Path:
    """Write the weights of a model of timm, some in half precision."""
    torch.manual_seed(1)
    state = timm.create_model(name, **options).state_dict()
    halves = {key: t.half() if t.ndim == 1 else t.contiguous() for key, t in state.items()}
    save_file(halves, path)
    return path


def test_a_backbone_is_the_same_as_built_the_usual_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "rope.safetensors", "eva02_tiny_patch14_224", **ROPE)
    calls: list[dict[str, Any]] = [
        {"name": "vit_nano", "num_classes": 3, "image_size": 48},
        {"name": "vit_nano", "num_classes": 10, "channels": 1, "head": "bn_linear"},
        {"name": "eva02_tiny_patch14_224", "num_classes": 4, "weights": str(file), "options": ROPE},
    ]
    models = [create_backbone(**arguments).model for arguments in calls]
    pretrained = written(tmp_path / "pretrained.safetensors", "test_vit")
    models.append(timm_models.build_timm("test_vit", {}, 7, {"file": str(pretrained)}))
    usual_way(monkeypatch)
    others = [create_backbone(**arguments).model for arguments in calls]
    others.append(timm_models.build_timm("test_vit", {}, 7, {"file": str(pretrained)}))
    for mine, theirs in zip(models[:3], others[:3], strict=True):
        check_same(mine, theirs)
    for module in (models[3], others[3]):  # a new classifier, which `set_head` fills
        module.reset_classifier(0)  # type: ignore[operator]
    check_same(models[3], others[3])


def test_weights_of_transformers_stay_in_files_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**shape, image_size=32, patch_size=16, num_labels=5)
    source = transformers.ViTForImageClassification(config)
    folders = tmp_path / "one", tmp_path / "several"
    for folder, size in zip(folders, ("1GB", "1MB"), strict=True):
        source.save_pretrained(folder, max_shard_size=size)
    arguments: list[dict[str, Any]] = [{"name": f"hf:{folder}", "num_classes": 3} for folder in folders]
    torch.save({"epoch": 3, "model": source.state_dict()}, tmp_path / "whole.pth")
    for file in (str(folders[0] / "model.safetensors"), str(tmp_path / "whole.pth")):
        arguments.append({"name": f"hf:{folders[0]}", "weights": file, "num_classes": 3})
    models = [create_backbone(**given, stay_in_file=True).model for given in arguments]
    assert (folders[1] / "model.safetensors.index.json").exists()
    assert [len(in_file_of(model)) for model in models] == [7, 7, 7, 7]
    usual_way(monkeypatch)
    for given, model in zip(arguments, models, strict=True):
        check_same(model, create_backbone(**given).model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("total", self.layer.weight.detach().sum(), persistent=False)


@pytest.mark.parametrize("kind", [Tied, Computed])
def test_what_would_not_be_the_same_is_built_the_usual_way(kind: type[nn.Module], tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({key: t.clone() for key, t in kind().state_dict().items()}, file)

    def build() -> nn.Module:
        model = kind()
        model.load_state_dict(load_file(file))
        return model

    assert build_from_file(build, file) is None
    assert not any(p.is_meta for p in nn.Linear(2, 2).parameters())  # nothing stays patched


def test_weights_in_a_file_compute_the_same_and_are_taken_out_when_they_train(tmp_path: Path) -> None:
    file = save(tmp_path / "weights.safetensors")
    mapped, usual = (
        create_backbone(BACKBONE, weights=str(file), options=SHAPE, num_classes=3, stay_in_file=stays).model
        for stays in (True, False)
    )
    in_file = in_file_of(mapped)
    assert "blocks.0.mlp.fc1.weight" in in_file
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = usual(x)
        with read_layer_by_layer(mapped):
            assert torch.equal(mapped(x), expected)
        assert torch.equal(mapped(x), expected)
    att, other = (petune.attach(model, "adaptformer:bottleneck=4") for model in (mapped, usual))
    assert att.fingerprint() == other.fingerprint()
    settle(mapped.parameters())
    assert in_file_of(mapped) == in_file
    changed, trained = (mapped.get_submodule(f"blocks.{i}.mlp.fc1") for i in range(2))
    changed.weight.data.mul_(2)  # type: ignore[union-attr, operator]  # as a method that changes the backbone
    trained.weight.requires_grad_(True)  # type: ignore[union-attr, operator]
    settle(mapped.parameters())
    assert in_file - in_file_of(mapped) == {"blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"}


def test_a_run_in_bf16_saves_the_same_adapter_and_leaves_weights_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save(tmp_path / "weights.safetensors")
    train = {"epochs": 1, "batch_size": 8, "precision": "bf16"}
    common: dict[str, Any] = {"backbone": BACKBONE, "backbone_options": SHAPE, "weights": str(file), "device": "cpu"}
    common |= {"dataset": "digits", "shots": 2, "train": train, "method": "adaptformer:bottleneck=4"}
    rounded: list[int] = []
    monkeypatch.setattr(bf16_weights, "keep_rounded", lambda p, values: rounded.append(keep_rounded(p, values) or 1))
    mine = petune.run(output=tmp_path / "mine", **common)
    assert sum(rounded) == 6
    usual_way(monkeypatch)
    theirs = petune.run(output=tmp_path / "theirs", **common)
    assert sum(rounded) == 6
    assert mine.metrics == theirs.metrics
    adapters = [tmp_path / name / "adapter" for name in ("mine", "theirs")]
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in adapters]
    for key in ("fingerprint", "reference_logits"):
        assert configs[0][key] == configs[1][key]
    tensors, others = (load_file(path / "adapter_model.safetensors") for path in adapters)
    assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())
