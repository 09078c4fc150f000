"""Pushing to a hub on this machine and pulling from it; every failure is one quick error and changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch

import petune
from petune.adapters.format import read_adapter
from petune.base.errors import CheckpointError, HubError, PetuneError, PluginError, UsageError
from petune.serving import hub_client, hub_pull, hub_push
from petune.serving.hub_pull import pull
from petune.serving.hub_push import push
from petune.serving.restore import task_of
from tests.fake_hub import TOKEN, Server, point_at, running
from tests.program import call
from tests.sampling import sampled
from tests.tiny import X, randomised, tiny
from tests.trained import changed

# of httpx2, about how huggingface_hub 2.4 sends bytes
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with running() as served:
        point_at(served.url, tmp_path / "cache", monkeypatch, stall_timeout_s=7.0)  # a busy machine may be slow
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.chdir(tmp_path)
        yield served


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    randomised(petune.attach(tiny(), "adaptformer")).save(tmp_path / "a", metadata={"classes": list("abcde")})
    return tmp_path / "a"


@pytest.mark.exhaustive
def test_it_works_in_a_process_that_imported_nothing_before(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "petune", "pull", "me/pets"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert "HF_HUB_OFFLINE is set" in done.stderr


def files_in(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def hidden_files(directory: Path) -> list[str]:
    return [file.name for file in directory.iterdir() if file.name.startswith(".")]


def test_push_and_pull(hub: Server, adapter: Path, tmp_path: Path) -> None:
    pushed = push(adapter, "me/flowers", private=True)
    assert (pushed.repo, pushed.new, pushed.url) == ("me/flowers", True, f"{hub.url}/me/flowers")
    assert hub.private == {"me/flowers"}
    assert hub.repos["me/flowers"] == files_in(adapter)
    pulled = pull("me/flowers")
    assert (pulled.output, pulled.method, pulled.commit) == ("flowers", "adaptformer", pushed.commit)
    assert files_in(tmp_path / "flowers") == files_in(adapter)
    att = petune.load(tiny(), "flowers")
    assert torch.equal(att.model(X), petune.load(tiny(), adapter).model(X))
    assert hidden_files(tmp_path) == []


def test_an_adapter_for_the_task_of_a_plugin(hub: Server, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is shared without the plugin, and the card names its metrics; using it names the plugin."""
    monkeypatch.setenv("PETUNE_PLUGINS", "none")
    task = {"name": "ordinal", "options": {}, "state": {}, "target": {"kind": "class", "names": list("abcde")}}
    info = [{"name": "mae", "label": "MAE in classes", "higher_is_better": False}]
    about = {"dataset": "shapes", "dataset_license": "CC0", "test": {"metrics": {"mae": 0.5}, "num_images": 9}}
    petune.attach(tiny(), "bitfit").save(
        "b", metadata={"classes": list("abcde"), "task": task, "metric_info": info, **about}
    )
    push("b", "me/grades")
    pull("me/grades")
    card = Path("grades", "README.md").read_text(encoding="utf-8")
    assert "Trained for ordinal on shapes, 5 classes" in card
    assert "| MAE in classes on test | 0.5 |" in card
    assert "| license of the dataset | CC0 |" in card
    with pytest.raises(PluginError, match="petune-ordinal"):
        task_of(read_adapter(Path("grades")))


def test_a_dry_run_shows_the_files_and_the_card_without_the_hub(
    hub: Server, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = call("push", str(adapter), "me/flowers", "--dry-run", capture=capsys)
    assert done.code == 0, done.err
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert "adapter_model.safetensors" in done.out
    assert card.strip() in done.out
    report = json.loads(call("push", str(adapter), "me/flowers", "--dry-run", "--json", capture=capsys).out)
    assert report["files"] == {name: len(content) for name, content in files_in(adapter).items()}
    assert report["card"] == card
    assert call("push", str(adapter), "no/such/name", "--dry-run", capture=capsys).code == 2
    assert call("push", str(adapter.parent), "me/flowers", "--dry-run", capture=capsys).code == 4
    assert hub.repos == {}


def test_an_update_replaces_the_files_and_keeps_an_edited_card(hub: Server, adapter: Path) -> None:
    push(adapter, "me/flowers")
    (adapter / "README.md").write_text("---\nlicense: mit\n---\nmine")
    with pytest.raises(HubError, match="me/flowers already exists"):
        push(adapter, "me/flowers")
    assert not push(adapter, "me/flowers", update=True).new
    pull("me/flowers")
    assert (Path("flowers") / "README.md").read_text() == "---\nlicense: mit\n---\nmine"
    hub.repos["me/flowers"]["README.md"] = b"edited on the hub"
    hub.repos["me/flowers"]["weights.bin"] = b"a pickle"
    pull("me/flowers")
    assert sorted(files_in(Path("flowers"))) == sorted(hub_pull.MAX_BYTES)
    petune.load(tiny(), "flowers")


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_peft_needs_no_manifest(hub: Server, tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["qkv"], r=2))
    model.save_pretrained(tmp_path / "by-peft")
    push(tmp_path / "by-peft", "me/lora")
    del hub.repos["me/lora"]["manifest.json"]
    assert pull("me/lora").method == "peft"
    petune.load(tiny(), "lora")


def error_of(command: str, adapter: Path) -> PetuneError:
    """Return the error of a command, which must come in under ten seconds and leave no files."""
    started = time.monotonic()
    with pytest.raises(PetuneError) as caught:
        push(adapter, "me/flowers") if command == "push" else pull("me/flowers", "out")
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()
    assert hidden_files(Path()) == []
    return caught.value


@pytest.fixture
def impatient(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up on a hub that hangs after two seconds."""
    monkeypatch.setattr("petune.serving.transfer.STALL_TIMEOUT_S", 2.0)
    monkeypatch.setattr(hub_push, "COMMIT_TIMEOUT_S", 2.0)


PUSH_FAULTS = [
    ("/api/repos/create", "403", r"refuses this token for me/flowers \(403\)"),
    ("/api/repos/create", "hangs", "failed for me/flowers: TimeoutError: no data for 2 s"),
    ("/preupload/", "500", "new repository me/flowers is empty"),
    ("/objects/batch", "hangs", "no data for 2 s"),
    ("/lfs-put/", "403", "403"),
    ("/commit/", "400", "BadRequestError"),
]


@pytest.mark.parametrize(("where", "fault", "message"), sampled(PUSH_FAULTS, lambda row: row[1] in {"403", "400"}))
def test_push_reports_a_bad_hub(
    where: str, fault: str, message: str, hub: Server, adapter: Path, impatient: None
) -> None:
    hub.fault = (where, fault)
    with pytest.raises(HubError, match=message):
        raise error_of("push", adapter)


KEPT = {"other bytes"}
PULL_FAULTS = [
    ("/api/models/", "500", "failed for me/flowers"),
    ("/api/models/", "hangs", "no data for 2 s"),
    ("/resolve/", "500", "failed for me/flowers"),
    ("safetensors", "cut off", "me/flowers"),
    ("safetensors", "stalls", "no data for 2 s"),
    ("safetensors", "other bytes", "adapter_model.safetensors of me/flowers was damaged"),
    ("adapter_config", "other bytes", "me/flowers has no valid adapter"),
]


@pytest.mark.parametrize(("where", "fault", "message"), sampled(PULL_FAULTS, lambda row: row[1] in KEPT))
def test_pull_reports_a_bad_hub(
    where: str, fault: str, message: str, hub: Server, adapter: Path, impatient: None
) -> None:
    hub.repos["me/flowers"] = files_in(adapter)
    hub.fault = (where, fault)
    with pytest.raises(PetuneError, match=message):
        raise error_of("pull", adapter)


def test_without_token_network_or_repository(hub: Server, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match="no such repository: me/flowers"):
        raise error_of("pull", adapter)
    with pytest.raises(HubError, match="no such repository: me/none"):
        push(adapter, "me/none", update=True)
    hub.repos["me/flowers"] = files_in(adapter)
    with pytest.raises(HubError, match="has no such revision"):
        pull("me/flowers", revision="v9")
    hub.repos.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="refuses this token"):
        raise error_of("push", adapter)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="HF_TOKEN"):
        raise error_of("push", adapter)
    num_requests = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for command in ("push", "pull"):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
            raise error_of(command, adapter)
    assert len(hub.requests) == num_requests
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        raise error_of("pull", adapter)


@pytest.mark.parametrize("method", sampled(["adaptformer", "lora"], "lora".__eq__))
def test_folders_of_this_machine_are_not_pushed(method: str, hub: Server, tmp_path: Path) -> None:
    metadata = {
        "dataset": "folder:/home/me/secret/pets",
        "split_options": {"dataset": "folder:/home/me/secret/pets", "fold": 2},
        "val_split": {"dataset": "folder:/home/me/secret/pets"},
        "backbone": {"name": "vit", "weights": "/home/me/secret/w.pt"},
    }
    petune.attach(tiny(), method).save(tmp_path / "a", metadata=metadata)
    assert b"secret" in (tmp_path / "a" / "adapter_config.json").read_bytes()
    push(tmp_path / "a", "me/flowers")
    assert not [name for name, content in hub.repos["me/flowers"].items() if b"secret" in content]
    pull("me/flowers")
    config = json.loads(Path("flowers/adapter_config.json").read_bytes())
    own = config if method == "adaptformer" else config["auto_mapping"]["petune"]
    assert (own["metadata"]["dataset"], own["metadata"]["backbone"]["weights"]) == ("folder:pets", "w.pt")
    assert own["metadata"]["split_options"] == {"dataset": "folder:pets", "fold": 2}
    petune.load(tiny(), "flowers")


def test_the_commands(hub: Server, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = call("push", adapter, "me/flowers", capture=capsys)
    assert (done.code, done.out.split()[0]) == (0, f"{hub.url}/me/flowers")
    assert done.err == "download it with: petune pull me/flowers\n"
    done = call("pull", "me/flowers", "here", "--json", capture=capsys)
    assert json.loads(done.out)["output"] == "here"
    done = call("pull", "me/none", capture=capsys)
    assert (done.code, done.err.count("\n")) == (4, 1)


def test_invalid_names_and_other_directories_are_refused(hub: Server, adapter: Path, tmp_path: Path) -> None:
    for name in ("a/b/c", "../up", "", "x y"):
        with pytest.raises(UsageError, match="not a valid repository name"):
            pull(name, "out")
    hub.repos["me/flowers"] = files_in(adapter)
    shutil.copytree(adapter, tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for output in ("mine", "file", str(tmp_path)):
        with pytest.raises(UsageError, match="is not an adapter directory"):
            pull("me/flowers", output)
    with pytest.raises(CheckpointError, match="nowhere"):
        push(tmp_path / "nowhere", "me/x")
    assert "me/x" not in hub.repos


def test_a_name_is_checked_before_anything_else(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_client, "why_unreachable", lambda *_, **__: pytest.fail("asked the hub"))
    for name in ("x y", "me/", "a/b/c", "-pets"):
        with pytest.raises(UsageError, match="Use user/name"):
            push(adapter.parent / "nowhere", name)
    with pytest.raises(UsageError, match="user/pets"):
        push(adapter, "pets", update=True)
    monkeypatch.setattr(hub_client, "why_unreachable", lambda *_, **__: "asked the hub")
    with pytest.raises(HubError, match="asked the hub"):
        push(adapter, "pets")  # the hub completes the name with the user of the token


def test_other_repositories_are_refused(hub: Server, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_in(adapter)
    hub.repos["me/flowers"] = {"adapter_model.bin": b"\x80\x02", "adapter_config.json": b"{}"}
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        raise error_of("pull", adapter)
    hub.repos["me/flowers"] = files
    monkeypatch.setitem(hub_pull.MAX_BYTES, "adapter_config.json", 10)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json of me/flowers has .* more than the 10"):
        raise error_of("pull", adapter)
    monkeypatch.undo()


def test_a_download_stops_at_the_listed_size(hub: Server, adapter: Path) -> None:
    hub.repos["me/flowers"] = files_in(adapter)
    hub.listed_size, hub.fault = 10, ("safetensors", "endless")
    assert "me/flowers" in str(error_of("pull", adapter))


CODE = [
    {"name": "subprocess:run", "options": {"args": ["true"]}},
    {"name": "hf:x/y", "options": {"trust_remote_code": True}},
]


@pytest.mark.parametrize("backbone", CODE)
def test_code_is_refused_unless_trusted(backbone: dict[str, Any], hub: Server, adapter: Path) -> None:
    changed(adapter, adapter, backbone=backbone)
    hub.repos["me/flowers"] = files_in(adapter)
    with pytest.raises(CheckpointError, match="code that would run here"):
        raise error_of("pull", adapter)
    assert pull("me/flowers", "trusted", trust_remote_code=True).output == "trusted"
