"""Saved adapters: bit-exact when loaded, and refused on any other backbone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import petune
from petune.adapters.format import read_adapter
from petune.adapters.migrations import FORMAT
from petune.base.errors import BackboneMismatch, CheckpointError, PluginError, UsageError
from tests.tiny import X, tiny, trained as train

METHODS = ["adaptformer", "vpt", "vpt:shallow", "linear", "full"]


def trained(method: str = "adaptformer", model: nn.Module | None = None) -> petune.Attachment:
    name, _, shallow = method.partition(":")
    att = petune.attach(model or tiny(), name, **({"deep": False} if shallow else {}))
    return train(att)


@pytest.mark.parametrize("method", METHODS)
def test_loaded_on_a_fresh_model_it_is_bit_exact(method: str, tmp_path: Path) -> None:
    att = trained(method)
    att.save(tmp_path / "a", metadata={"classes": list("abcde")})
    fresh = tiny()
    again = petune.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(X), att.model(X))
    assert again.counts == att.counts
    assert again.tuner.config == att.tuner.config
    again.save(tmp_path / "b", metadata={"classes": list("abcde")})
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    again.detach()
    assert torch.equal(fresh(X), tiny()(X))


def test_what_is_saved_is_what_trains_and_small(tmp_path: Path) -> None:
    att = trained()
    att.save(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert set(tensors) == {*att.tuned, *att.head}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["format"], config["tuner"], config["distribution"]) == (FORMAT, "adaptformer", "petune")
    assert config["geometry"]["depth"] == 2


def test_a_run_directory_is_loaded_from_the_adapter_in_it(tmp_path: Path) -> None:
    att = trained()
    att.save(tmp_path / "run" / "adapter")
    fresh = tiny()
    petune.load(fresh, tmp_path / "run")
    assert torch.equal(fresh(X), att.model(X))


def test_buffers_of_the_head_are_saved(tmp_path: Path) -> None:
    def model() -> nn.Module:
        built = tiny()
        built.head = nn.Sequential(nn.BatchNorm1d(24, affine=False), built.head)
        return built

    att = trained("linear", model())
    att.save(tmp_path / "a")
    assert "head.0.running_mean" in load_file(tmp_path / "a" / "adapter_model.safetensors")
    fresh = model()
    petune.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(X), att.model(X))


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "depth": (lambda: tiny(depth=3), "depth 2 .this model: 3"),
    "width": (lambda: tiny(embed_dim=32), "width 24 .this model: 32"),
    "patch": (lambda: tiny(patch_size=8), r"grid \[4, 4\] .this model: \[2, 2\]"),
    "prefix": (lambda: tiny(class_token=False, global_pool="avg"), "prefix_tokens 1 .this model: 0"),
    "classes": (lambda: tiny(num_classes=7), "another number of classes"),
    "weights": (lambda: tiny(seed=1), "same shape with other weights"),
    "one bit of one weight": (lambda: _nudged(), "same shape with other weights"),
}


def _nudged() -> nn.Module:
    model = tiny()
    with torch.no_grad():
        w = model.blocks[1].mlp.fc1.weight
        w[3, 4] = torch.nextafter(w[3, 4], torch.tensor(9.0))
    return model


@pytest.mark.parametrize("difference", WRONG)
def test_another_backbone_is_refused_with_the_difference_and_left_as_it_was(difference: str, tmp_path: Path) -> None:
    trained().save(tmp_path / "a")
    build, message = WRONG[difference]
    model = build()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(BackboneMismatch, match=message):
        petune.load(model, tmp_path / "a")
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_the_image_size_is_taken_from_the_file(tmp_path: Path) -> None:
    class Silent(nn.Module):
        """A model that does not tell how large its images are."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.inner(images)
            return logits

    dynamic = tiny(dynamic_img_size=True)
    for number, (model, side) in enumerate([(Silent(), 16), (dynamic, 32), (dynamic, 16)]):
        att = petune.attach(model, "vpt", input_size=(3, side, side))
        att.save(tmp_path / str(number))
        att.detach()
        again = petune.load(model, tmp_path / str(number))
        assert again.sites.input_size == (3, side, side)
        again.detach()


def test_damage_and_newer_formats_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(CheckpointError, match=r"no adapter in .*adapter_config\.json"):
        petune.load(tiny(), path)
    att = trained()
    att.save(path)
    file = path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged"):
        petune.load(tiny(), path)
    att.save(path)
    petune.load(tiny(), path)


def _resealed(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    from petune.base.files import write_directory

    files = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "manifest.json"}
    config = json.loads(files["adapter_config.json"])
    change(config)
    write_directory(path, {**files, "adapter_config.json": json.dumps(config).encode()})


def test_a_newer_format_and_an_unknown_tuner_say_what_to_do(tmp_path: Path) -> None:
    trained().save(tmp_path / "a")
    _resealed(tmp_path / "a", lambda c: c.update(format=99))
    with pytest.raises(CheckpointError, match=r"format 99.* pip install -U petune"):
        petune.load(tiny(), tmp_path / "a")
    _resealed(tmp_path / "a", lambda c: c.update(format=2, tuner="mytuner"))
    with pytest.raises(PluginError, match=r"'mytuner', which is not installed.* petune 0"):
        petune.load(tiny(), tmp_path / "a")
    _resealed(tmp_path / "a", lambda c: c.pop("format"))
    with pytest.raises(CheckpointError, match="not an adapter directory"):
        petune.load(tiny(), tmp_path / "a")
    _resealed(tmp_path / "a", lambda c: (c.update(format=2), c.pop("fingerprint")))
    with pytest.raises(CheckpointError, match="fingerprint is missing"):
        petune.load(tiny(), tmp_path / "a")


def test_saving_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        trained().save(tmp_path / "file" / "a")


def test_only_an_adapter_is_replaced(tmp_path: Path) -> None:
    att = trained("linear")
    for name in ("run/checkpoint/model.safetensors", "run/adapter_config.json", "file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "link").symlink_to("elsewhere")
    before = sorted(tmp_path.rglob("*"))
    for path in ("run", "file", "link"):
        with pytest.raises(UsageError, match=r"exists and is not an adapter directory"):
            att.save(tmp_path / path)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == (tmp_path / "run" / "adapter_config.json").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    for metadata in ({}, {"classes": ["a"]}):
        att.save(tmp_path / "empty", metadata=metadata)
    assert read_adapter(tmp_path / "empty").config["metadata"] == {"classes": ["a"]}


def test_metadata_of_any_kind_loads_and_what_fails_is_taken_off_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"metadata\['top1'\] cannot be saved as JSON"):
        trained().save(tmp_path / "a", metadata={"classes": ["x"], "top1": np.float32(0.5)})
    assert not (tmp_path / "a").exists()
    trained().save(tmp_path / "a", metadata={"backbone": "vit_tiny"})
    model = tiny()
    before = list(model.state_dict())

    def wrong(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("petune.injector.load.check_fits", wrong)
        with pytest.raises(MemoryError):
            petune.load(model, tmp_path / "a")
    assert list(model.state_dict()) == before
    assert petune.load(model, tmp_path / "a").attached


@pytest.mark.parametrize("method", ["adaptformer", "prefix"])
def test_a_tuner_of_a_registered_class_is_saved_by_its_registered_name(method: str, tmp_path: Path) -> None:
    cls = type(petune.attach(tiny(), method).tuner)
    assert petune.attach(tiny(), cls()).name == method
    att = train(petune.attach(tiny(), cls(), name="pets"))
    att.save(tmp_path)
    fresh = tiny()
    assert petune.load(fresh, tmp_path).method == method
    assert torch.equal(fresh(X), att.model(X))
