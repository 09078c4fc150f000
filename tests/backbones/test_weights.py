"""Weights: where they come from, and what a run records about them."""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import petune
from petune.backbones.create import create_backbone
from petune.backbones.weights import Weights, bundled_file, load_into, read_weights
from petune.base import hub
from petune.base.errors import CheckpointError, WeightsUnavailable
from petune.serving.restore import restore


def test_bundled_weights_are_recorded_by_digest_and_others_by_path(tmp_path: Path) -> None:
    file = bundled_file("cifar100")
    assert file is not None
    copy = shutil.copy(file, tmp_path / "mine.safetensors")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]

    assert create_backbone("vit_nano", num_classes=2).weights == f"petune's vit_nano_cifar100 (sha256 {digest})"
    assert create_backbone("vit_nano", weights=str(copy), num_classes=2).weights == str(copy)


class Deep(nn.Module):
    """Layers and a classifier below the same prefix, as in transformers' models."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))
        self.model.classifier = nn.Linear(2, 2)


def test_unexpected_layers_are_named() -> None:
    head = {"model.classifier.weight", "model.classifier.bias"}
    load_into(Deep(2), Weights(Deep(2).state_dict(), {}, "file"), head)
    with pytest.raises(CheckpointError, match=r"2 unexpected: model\.layers\.1\.bias, model\.layers\.1\.weight"):
        load_into(Deep(1), Weights(Deep(2).state_dict(), {}, "file"), head)


def test_timm_supplies_statistics_that_a_file_lacks(tmp_path: Path) -> None:
    shape = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    saved = create_backbone("vit_tiny", weights="none", num_classes=2, image_size=32, options=shape).model
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    arguments = {"weights": str(tmp_path / "w.safetensors"), "num_classes": 2, "image_size": 32, "options": shape}
    timms = create_backbone("vit_tiny", **arguments)
    assert (timms.mean, timms.std) == ((0.5,) * 3, (0.5,) * 3)
    unknown = create_backbone(
        "vit_paddle_study", **(arguments | {"patch_size": 16, "options": shape | {"qkv_bias": True}})
    )
    assert (unknown.mean, unknown.std) == (None, None)


@pytest.mark.exhaustive
def test_a_run_notes_that_a_file_has_no_statistics(tmp_path: Path) -> None:
    shape = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    saved = create_backbone("vit_nano", weights="none", num_classes=10, image_size=8, options=shape).model
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    notes: list[str] = []
    petune.run(
        method="linear", backbone="vit_nano", weights=str(tmp_path / "w.safetensors"), dataset="digits", image_size=8,
        backbone_options=shape, shots=2, train={"epochs": 1, "batch_size": 10}, device="cpu",
        output=tmp_path / "run", watch=lambda event: notes.append(str(event)),
    )  # fmt: skip
    assert any("does not record mean and std" in note for note in notes)


def test_an_adapter_finds_its_weights_file_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    saved = create_backbone("vit_nano", weights="none", num_classes=10, image_size=8, options=shape).model
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    petune.run(
        method="linear", backbone="vit_nano", weights="./w.safetensors", dataset="digits", image_size=8,
        backbone_options=shape, shots=2, train={"epochs": 1, "batch_size": 10}, device="cpu",
        output=tmp_path / "run",
    )  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert restore(tmp_path / "run").attachment.attached
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(WeightsUnavailable, match=r"the weights that .* was trained on are not available"):
        restore(tmp_path / "run")


TENSORS = {"a.weight": torch.ones(2), "b.bias": torch.zeros(3)}
OPTIONS = argparse.Namespace(lr=0.1, output=Path("out"))


def _prefixed(*starts: str) -> dict[str, Tensor]:
    return {"".join(starts) + key: tensor for key, tensor in TENSORS.items()}


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "model_best.pth.tar", "last.ckpt", "weights"])
@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        {"state_dict": TENSORS, "args": OPTIONS, "epoch": 3, "arch": "vit"},
        {"model": OrderedDict(TENSORS), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        {"state_dict": _prefixed("module.")},
        {"state_dict": _prefixed("_orig_mod.")},
        {"state_dict": _prefixed("module.", "_orig_mod.")},
        {"state_dict": {"a.weight": torch.zeros(2)}, "state_dict_ema": _prefixed("module.")},
        {"state_dict": TENSORS, "state_dict_ema": None},
        {"model_state_dict": TENSORS, "epoch": 3},
        {"model_ema": {"module": _prefixed("module."), "decay": 0.9}},
        {"n_averaged": torch.tensor(3), **_prefixed("module.")},
    ],
    ids=[
        "bare",
        "timm",
        "model",
        "ddp",
        "compiled",
        "both",
        "ema",
        "no-ema",
        "model_state_dict",
        "entry of an entry",
        "AveragedModel",
    ],
)
def test_a_checkpoint_is_read_as_timm_reads_it(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / name)
    weights = read_weights(tmp_path / name)
    assert weights.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensor, TENSORS[key]) for key, tensor in weights.tensors.items())
    assert ("state_dict_ema" in weights.source) == bool(content.get("state_dict_ema"))


@pytest.mark.parametrize("order", [sorted, reversed])
def test_a_checkpoint_that_was_packed_again_has_its_values(order: Any, tmp_path: Path) -> None:
    state = {f"{n}.weight": torch.randn(2**9, 2**7) for n in range(12)}
    torch.save({"model": state, "note": "xx"}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as written, zipfile.ZipFile(tmp_path / "again.pth", "w") as packed:
        for name in order(written.namelist()):
            packed.writestr(name, written.read(name))
    tensors = read_weights(tmp_path / "again.pth").tensors
    assert all(torch.equal(tensor, state[key]) for key, tensor in tensors.items())


def test_a_damaged_checkpoint_is_refused_by_its_checksums(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(1000)}, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    position = content.index(torch.ones(100).numpy().tobytes())
    (tmp_path / "w.pth").write_bytes(content[:position] + b"\1" + content[position + 1 :])
    with pytest.raises(CheckpointError, match=r"w\.pth is damaged: w/data/0"):
        read_weights(tmp_path / "w.pth")
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"a.weight": torch.ones(1000)}, tmp_path / "without.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_weights(tmp_path / "without.pth").tensors["a.weight"], torch.ones(1000))


def test_values_that_cannot_be_weights_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
    state = timm.create_model("vit_tiny_patch16_224", **options).state_dict()
    key = "blocks.0.mlp.fc1.weight"
    build = functools.partial(create_backbone, "vit_tiny", num_classes=3, options=options)
    faulty = {
        "quantized": torch.ones_like(state[key], dtype=torch.int8),
        "NaN": torch.full_like(state[key], float("nan")),
        "with NaN": torch.full_like(state[key], float("nan")).to(torch.float8_e5m2),
        "bool": torch.ones_like(state[key], dtype=torch.bool),
    }
    for problem, values in faulty.items():
        save_file({**state, key: values}, tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match=f"1 .*{problem}.*: {key}"):
            build(weights=str(tmp_path / "w.safetensors"))
    values = state[key].to(torch.float8_e4m3fn)
    save_file({**state, key: values}, tmp_path / "w.safetensors")
    built = build(weights=str(tmp_path / "w.safetensors")).model.state_dict()[key]
    assert built.dtype == torch.float32
    assert torch.equal(built, values.float())


@pytest.mark.filterwarnings("ignore")  # torch's own, of sparse and quantized tensors
def test_tensors_of_a_checkpoint_that_have_no_plain_values_are_refused(tmp_path: Path) -> None:
    weight = torch.eye(3)
    faulty = {
        "sparse_coo": weight.to_sparse(),
        "qint8": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "meta device": weight.to("meta"),
    }
    for kind, values in faulty.items():
        torch.save({"a.bias": torch.ones(2), "a.weight": values}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=f"a.weight, which .*{kind}"):
            read_weights(tmp_path / "w.pth")


def test_starts_of_wrappers_are_removed_from_safetensors_too(tmp_path: Path) -> None:
    save_file(_prefixed("module."), tmp_path / "w.bin")  # safetensors by content
    assert read_weights(tmp_path / "w.bin").tensors.keys() == TENSORS.keys()


def test_a_module_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    save_file({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors").tensors.keys() == {"module.a", "b"}


def test_other_objects_are_named_in_whole_sentences(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS, "when": datetime.date(2024, 1, 1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"objects that are not read: datetime\.date") as caught:
        read_weights(tmp_path / "w.pt")
    text = str(caught.value)
    assert text.isprintable()
    assert text.endswith("torch.save(model.state_dict(), path)")


@pytest.mark.parametrize("content", [b"hello world\n", b"", b"<html>", b"\x80\x02."])
def test_an_invalid_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"t\.pt") as caught:
        read_weights(tmp_path / "t.pt")
    assert str(caught.value).isprintable()


def test_invalid_metadata_is_reported(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors", metadata={"petune": "null"})
    with pytest.raises(CheckpointError, match=r"w\.safetensors is damaged"):
        read_weights(tmp_path / "w.safetensors")


def test_only_what_was_read_and_found_damaged_is_taken_out_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(1)}, file)
    assert hub.verify_safetensors(file, "the cached weights") == file

    def refused(self: Path, *args: object, **rest: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:  # root may read everything
        patched.setattr(Path, "open", refused)
        with pytest.raises(WeightsUnavailable, match=r"cannot read .*: Permission denied"):
            hub.verify_safetensors(file, "the cached weights")
    assert file.exists()
    file.write_bytes(b"damaged")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refused)
        with pytest.raises(WeightsUnavailable, match=r"cannot be deleted \(Permission denied\)"):
            hub.verify_safetensors(file, "the cached weights")
    with pytest.raises(WeightsUnavailable, match="It was deleted"):
        hub.verify_safetensors(file, "the cached weights")
    assert not file.exists()


@pytest.fixture(scope="module")
def transformers_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories that transformers wrote: a ViT with five classes, one without a classifier, one of timm."""
    folder = tmp_path_factory.mktemp("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder / "classifier")
    transformers.ViTModel(config).save_pretrained(folder / "features")
    arguments = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}
    wrapped = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=5, model_args=arguments, do_pooling=True
    )
    transformers.TimmWrapperForImageClassification(wrapped).save_pretrained(folder / "timm")
    return folder


@pytest.mark.parametrize("num_classes", [5, 3])
@pytest.mark.parametrize("source", ["classifier", "features"])
@pytest.mark.parametrize("backbone", ["classifier", "features"])
def test_transformers_own_file_fits_its_models(
    backbone: str, source: str, num_classes: int, transformers_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = transformers_files / source / "model.safetensors"
    model = create_backbone(f"hf:{transformers_files / backbone}", weights=str(file), num_classes=num_classes).model
    original = transformers.ViTModel.from_pretrained(transformers_files / source, add_pooling_layer=False).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.vit(x).last_hidden_state, original(x).last_hidden_state)  # type: ignore[operator]
    assert model(x).shape == (2, num_classes)


def test_a_damaged_file_in_a_directory_of_transformers_is_named(transformers_files: Path, tmp_path: Path) -> None:
    model = transformers.ViTForImageClassification.from_pretrained(transformers_files / "classifier")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = tmp_path / "model-00002-of-00004.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    for file in (shard, index):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=file.name):
            create_backbone(f"hf:{tmp_path}", num_classes=5)
        file.write_bytes(content)
    for file in tmp_path.glob("model*"):
        file.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    values = model.vit.layers[1].mlp.fc1.weight.detach().numpy().tobytes()
    for damaged in (content.replace(values, values[:-1] + b"\1"), b"<html>"):
        (tmp_path / "pytorch_model.bin").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.* damaged"):
            create_backbone(f"hf:{tmp_path}", num_classes=5)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert create_backbone(f"hf:{tmp_path}", num_classes=5).model


def test_a_file_of_another_model_does_not_fit_one_of_transformers(transformers_files: Path, tmp_path: Path) -> None:
    save_file({"encoder.other": torch.ones(1)}, tmp_path / "w.safetensors")
    backbone = f"hf:{transformers_files / 'classifier'}"
    with pytest.raises(CheckpointError, match="does not fit this backbone: 38 missing"):
        create_backbone(backbone, weights=str(tmp_path / "w.safetensors"), num_classes=3)


@pytest.mark.parametrize("num_classes", [5, 3])
def test_timms_model_in_a_wrapper_of_transformers_gets_another_classifier(
    num_classes: int, transformers_files: Path
) -> None:
    model = create_backbone(f"hf:{transformers_files / 'timm'}", num_classes=num_classes).model
    stored = read_weights(transformers_files / "timm" / "model.safetensors").tensors
    key = "timm_model.blocks.1.mlp.fc1.weight"
    assert torch.equal(model.state_dict()[key], stored[key])
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, num_classes)


def test_weights_without_registers_do_not_fit_a_model_with_them(tmp_path: Path) -> None:
    shape = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    saved = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, **shape)
    save_file(saved.state_dict(), tmp_path / "w.safetensors")
    arguments: Any = {"weights": str(tmp_path / "w.safetensors"), "num_classes": 2, "image_size": 32}
    with pytest.raises(CheckpointError, match="does not fit"):
        create_backbone("vit_tiny_patch16_224", **arguments, options={**shape, "reg_tokens": 4})


class WithAuxiliary(nn.Module):
    """A second classifier next to the head, which timm's configuration names (VOLO)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.head, self.aux_head = nn.Linear(2, 2), nn.Linear(2, num_classes), nn.Linear(2, num_classes)
        self.__dict__["pretrained_cfg"] = {"classifier": ("head", "aux_head")}


def test_an_auxiliary_classifier_of_other_classes_is_not_read() -> None:
    file, same, other = WithAuxiliary(4), WithAuxiliary(4), WithAuxiliary(3)
    fresh = other.aux_head.weight.clone()
    for model in (same, other):
        load_into(model, Weights(file.state_dict(), {}, "file"), {"head.weight", "head.bias"})
        assert torch.equal(model.body.weight, file.body.weight)
    assert torch.equal(same.aux_head.weight, file.aux_head.weight)
    assert torch.equal(other.aux_head.weight, fresh)
