"""Files that mean harm: nothing of them is executed, nothing is written outside, no control character is shown."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import petune
from petune.backbones.weights import read_weights
from petune.base.errors import CheckpointError, ConfigError, PetuneError
from petune.base.files import write_directory
from petune.base.yaml_values import read_yaml
from petune.data import load_dataset
from tests.faults.conftest import tally
from tests.injector.test_load import trained
from tests.tiny import tiny

MARK = "executed"


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.place / MARK),)


def _pickled(place: Path) -> object:
    file = place / "w.pt"
    torch.save({"state_dict": {"a": torch.zeros(1), "b": Bomb(place)}}, file)
    return read_weights(file)


def _plain_pickle(place: Path) -> object:
    file = place / "w.bin"
    file.write_bytes(pickle.dumps(Bomb(place), protocol=2))
    return read_weights(file)


def _pickle_called_safetensors(place: Path) -> object:
    file = place / "w.safetensors"
    file.write_bytes(pickle.dumps(Bomb(place)))
    return read_weights(file)


def _header_of_eight_exabytes(place: Path) -> object:
    file = place / "w.safetensors"
    file.write_bytes(struct.pack("<Q", 2**63 - 1) + b"{}")
    return read_weights(file)


def _header_beyond_the_end(place: Path) -> object:
    file = place / "w.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    return read_weights(file)


def _yaml_object(place: Path) -> object:
    file = place / "c.yaml"
    file.write_text(f"method: !!python/object/apply:os.mkdir ['{place / MARK}']\n")
    return read_yaml(file)


def _yaml_of_a_billion(place: Path) -> object:
    file = place / "c.yaml"
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    file.write_text("\n".join(lines))
    return petune.RunConfig.build(read_yaml(file), str(file))


def _adapter(place: Path, change: Callable[[dict[str, Any]], object], tensors: bytes | None = None) -> object:
    trained().save(place / "a")
    files = {p.name: p.read_bytes() for p in (place / "a").iterdir() if p.name != "manifest.json"}
    config = json.loads(files["adapter_config.json"])
    change(config)
    files["adapter_config.json"] = json.dumps(config).encode()
    if tensors is not None:
        files["adapter_model.safetensors"] = tensors
    write_directory(place / "a", files)
    return petune.load(tiny(), place / "a")


def _tuner_as_a_path(place: Path) -> object:
    return _adapter(place, lambda c: c.update(tuner="os:mkdir"))


def _tuner_config_with_more(place: Path) -> object:
    return _adapter(place, lambda c: c["config"].update(hook="os.system"))


def _adapter_of_pickle(place: Path) -> object:
    return _adapter(place, lambda c: None, pickle.dumps(Bomb(place)))


def _archive(place: Path, member: tarfile.TarInfo, content: bytes = b"x") -> object:
    data = place / "data"
    data.mkdir()
    member.size = len(content) if member.isfile() else 0
    with tarfile.open(data / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.addfile(member, io.BytesIO(content))
    return load_dataset("cifar10", data)


def _archive_with_dots(place: Path) -> object:
    return _archive(place, tarfile.TarInfo("../../executed"))


def _archive_with_a_link(place: Path) -> object:
    member = tarfile.TarInfo("cifar-10-batches-py")
    member.type, member.linkname = tarfile.SYMTYPE, str(place)
    return _archive(place, member)


HARM: dict[str, Callable[[Path], object]] = {
    name.strip("_").replace("_", " "): made
    for name, made in list(globals().items())
    if callable(made) and name.startswith("_") and name not in ("_adapter", "_archive") and not name.startswith("__")
}  # fmt: skip


def test_each_is_one_error_and_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(HARM) == 12
    held = 0
    for name, make in HARM.items():
        outside, place = tmp_path / name / "outside", tmp_path / name / "outside" / "in" / "side"
        place.mkdir(parents=True)
        monkeypatch.setenv("PETUNE_CACHE", str(place / "cache"))
        with pytest.raises(PetuneError) as caught:
            make(place)
        assert isinstance(caught.value, ConfigError | CheckpointError | PetuneError), name
        strangers = [p for p in outside.rglob("*") if p.name == MARK or place not in (p, *p.parents)]
        strangers = [p for p in strangers if p not in (outside / "in",)]
        held += strangers == []
    tally(
        "malicious pickles, archives, YAML, headers and adapters",
        "one error; nothing executed, nothing written outside",
        len(HARM),
        held,
    )


def test_names_with_markup_and_control_characters(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from petune.cli.main import main

    names = ["<script>alert(1)</script>".replace("/", "%"), "a|b", "\x1b]0;title\x07cat", "‮gnp"]
    for number, name in enumerate(names):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("L", (9, 9), 20 * number + i).save(tmp_path / "pets" / name / f"\x1b[2J{i}.png")
    words = ["compare", "linear", "--backbone=vit_nano", "--weights=none", "--set=backbone_options.depth=1"]
    words += [f"--dataset=folder:{tmp_path / 'pets'}", "--epochs=1", "--batch-size=8", "--device=cpu"]
    with pytest.raises(SystemExit) as stopped:
        main([*words, f"--output={tmp_path / 'out'}"])
    out, err = capfd.readouterr()
    assert stopped.value.code == 0, err
    assert not any(c in out + err for c in "\x1b\x07‮")
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "<script>" not in page
    card = json.loads(next((tmp_path / "out").glob("*/adapter/adapter_config.json")).read_text())
    assert sorted(card["metadata"]["classes"]) == sorted(names)
